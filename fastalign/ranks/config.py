"""Settings of the ranks that `torchrun` starts: how they share a run's models and its work."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of several ranks (torchrun), which share the models and each step's examples."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Keep all weights on every rank (ddp), or shard weights, gradients and optimiser states over
    the ranks (fsdp, PyTorch's FSDP2)."""
    reshard_after_forward: bool = True
    """With fsdp, free a layer's gathered weights between its forward and its backward pass."""
    no_sync: bool = False
    """With fsdp, keep whole gradients over a step's batches and reduce them once, as ddp does: less
    traffic, more memory."""
    offload: bool = False
    """With fsdp, keep weights, gradients and optimiser states in host memory."""
    timeout_seconds: float = 1800.0
    """Time limit in seconds of every collective; a rank that hangs is named after it."""
    silence_seconds: float = 20.0
    """Seconds that ranks have to answer once a collective has failed, before they are named as
    missing."""

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"parallel.strategy: expected ddp or fsdp, got {self.strategy!r}")
        for name in ("no_sync", "offload"):
            if getattr(self, name) and self.strategy != "fsdp":
                raise ValueError(f"parallel.{name}: needs --parallel.strategy fsdp")
        limit, silence = self.timeout_seconds, self.silence_seconds
        if not limit > 0:
            raise ValueError(f"parallel.timeout_seconds: expected more than 0, got {limit!r}")
        if not silence >= 0:
            raise ValueError(f"parallel.silence_seconds: expected at least 0, got {silence!r}")
