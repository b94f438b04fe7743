"""Where and how a run's forwards are computed: device, dtype, packing, and by which ranks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import ALONE, World


def find_device(name: str, argument: str = "device") -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ValueError: it is not one that can be used here; `argument` is what the caller wrote it in.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument}: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{argument}: {name} was asked for, but torch sees no GPU here")
    return device


AttentionChoice = Literal["auto", "sdpa", "flash_attn", "varlen", "flex"]


Packing = Literal["shared_prefix", "packed", "padded"]


PACKINGS: tuple[Packing, ...] = get_args(Packing)


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

    @property
    def product_dtype(self) -> torch.dtype | None:
        """The dtype of a head's products; None: that of its operands, float32."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the products' dtype, or nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
