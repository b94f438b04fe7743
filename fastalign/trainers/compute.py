"""Where and how a run's forwards are computed: device, dtype, packing, and by which ranks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from fastalign.models import AttentionChoice, Packing, find_device
from fastalign.trainers.config import TrainConfig
from fastalign.trainers.parallel_config import ParallelConfig
from fastalign.world import ALONE, World


@dataclass(frozen=True)
class Compute:
    """How forwards are run.

    Attributes:
        device: where.
        dtype: of the matrix products; weights are float32 whatever it is.
        packing: see `predict_hidden`.
        attention: asked for; each model runs what it can of it.
        tokens_per_batch: most packed tokens of a forward.
        max_buffer_bytes: of logits; None: the operation's default.
        world: the ranks that share the work.
        parallel: how they share the models.
    """

    device: torch.device
    dtype: torch.dtype
    packing: Packing
    attention: AttentionChoice
    tokens_per_batch: int
    max_buffer_bytes: int | None
    world: World = ALONE
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def syncs_each_batch(self) -> bool:
        """Whether gradients are summed over ranks after each batch, not at a step's last one."""
        return self.parallel.strategy == "fsdp" and not self.parallel.no_sync

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the products' dtype, or nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def make_compute(
    config: TrainConfig, world: World = ALONE, parallel: ParallelConfig | None = None
) -> Compute:
    """Resolves `auto` settings; of several ranks on a machine each has a GPU of its own.

    Raises:
        ValueError: a device that is not there.
    """
    device = device_of_rank(config.device, world)
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return Compute(
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        packing=config.packing,
        attention=config.attention,
        tokens_per_batch=config.tokens_per_batch,
        max_buffer_bytes=config.max_buffer_bytes,
        world=world,
        parallel=parallel or ParallelConfig(),
    )


def device_of_rank(name: str, world: World) -> torch.device:
    """What `train.device` names for this rank; of several on a machine each has a GPU of its own.

    Raises:
        ValueError: it is not there, or one GPU is named for several ranks.
    """
    device = find_device(name, "train.device")
    if world.size == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(
            f"train.device: expected cuda with several ranks, each has its own; got {device}"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"train.device: rank {world.rank} is number {world.local_rank} on its machine, which "
            f"has {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", world.local_rank)
