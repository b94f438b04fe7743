"""How the ranks that `torchrun` starts share a run's models and its work."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Several ranks (torchrun); they share every step's examples, and each step's gradient."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Every rank holds all weights (ddp), or a part of each weight, gradient and optimiser state
    of every model (fsdp: PyTorch's FSDP2)."""
    reshard_after_forward: bool = True
    """fsdp: let go of a layer's weights between its forward and its backward."""
    no_sync: bool = False
    """fsdp: keep whole gradients through a step's batches and reduce them once: less traffic, more
    memory. ddp always does."""
    offload: bool = False
    """fsdp: keep weights, gradients and optimiser states in host memory."""
    timeout_seconds: float = 1800.0
    """That a rank waits for the others at any one point before it gives up."""
    silence_seconds: float = 60.0
    """That a rank may show no life before the others name it and end; 0: any."""

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"parallel.strategy: expected ddp or fsdp, got {self.strategy!r}")
        for name in ("no_sync", "offload"):
            if getattr(self, name) and self.strategy != "fsdp":
                raise ValueError(f"parallel.{name}: needs --parallel.strategy fsdp")
        if not self.timeout_seconds > 0:
            raise ValueError(
                f"parallel.timeout_seconds: expected more than 0, got {self.timeout_seconds!r}"
            )
        if not self.silence_seconds >= 0:
            raise ValueError(
                f"parallel.silence_seconds: expected at least 0, got {self.silence_seconds!r}"
            )
