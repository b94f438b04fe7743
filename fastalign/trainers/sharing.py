"""How a run's ranks come to hold its models."""

from collections.abc import Callable
from typing import Any

from fastalign.models import load_on_first, share_by_ddp, share_by_fsdp
from fastalign.trainers.any_config import AnyConfig
from fastalign.trainers.compute import Compute
from fastalign.trainers.process_memory import LOADING, memory_used_in


def check_sharing(config: AnyConfig) -> None:
    """Refuses what FSDP2's shards do not go with.

    Raises:
        ValueError: naming the settings.
    """
    if config.parallel.strategy != "fsdp":
        return
    if config.model.lora.base == "nf4":
        raise ValueError(
            "model.lora.base: nf4 is not sharded; expected bf16 or float32 with "
            "--parallel.strategy fsdp, or --parallel.strategy ddp"
        )
    if config.optim.states != "float32":
        raise ValueError(
            "optim.states: 8bit states are not sharded; expected float32 with "
            "--parallel.strategy fsdp (each rank holds its part of them)"
        )
    if getattr(getattr(config, "reference", None), "offload", False):
        raise ValueError(
            "reference.offload: a sharded reference is not offloaded by layers; expected "
            "--parallel.offload with --parallel.strategy fsdp"
        )


def loaded(
    path: str, compute: Compute, load: Callable[[Any], Any], skeleton: Callable[[], Any]
) -> Any:
    """A model whose weights each rank has, or, of one that will be sharded, rank 0 alone.

    Args:
        path: where the model is read from.
        compute: of the run.
        load: reads the model to a device.
        skeleton: makes the same model without weights.
    """
    with memory_used_in(f"{LOADING}{path}"):
        if compute.parallel.strategy == "fsdp":
            return load_on_first(compute.world, lambda: load("cpu"), skeleton)
        return load(compute.device)


def share(model: Any, compute: Compute) -> Any:
    """The model as the run's ranks share it; it must be as it will be trained.

    A frozen model that is not sharded is each rank's own.
    """
    if compute.parallel.strategy == "fsdp":
        share_by_fsdp(
            model,
            dtype=compute.dtype,
            device=compute.device,
            reshard_after_forward=compute.parallel.reshard_after_forward,
            offload=compute.parallel.offload,
        )
    elif compute.world.size > 1 and any(p.requires_grad for p in model.parameters()):
        share_by_ddp(model)
    return model
