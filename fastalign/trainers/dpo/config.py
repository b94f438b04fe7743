"""Settings of DPO and related preference losses."""

from dataclasses import dataclass, field

from fastalign.ranks.config import ParallelConfig
from fastalign.runs.config import (
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    RunConfig,
    TrainConfig,
)
from fastalign.trainers.dpo.losses import LOSSES, PreferenceLoss


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference model that the policy is kept close to."""

    path: str | None = None
    """Folder or hub name; by default the model that training starts from."""
    cache_dir: str | None = None
    """Folder that caches reference log-probs; by default fastalign/ in the user's cache folder."""
    offload: bool = False
    """Keep the weights of reference.path in host memory and move its layers one by one."""

    def __post_init__(self) -> None:
        if self.offload and self.path is None:
            raise ValueError(
                "reference.offload: needs --reference.path; without it the reference is the model "
                "that training starts from"
            )


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation (DPO and related losses) on preference pairs."""

    model: ModelConfig
    data: PreferenceDataConfig
    run: RunConfig
    loss: PreferenceLoss = field(default_factory=LOSSES["dpo"])
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
