"""The settings of DPO and its relatives."""

from dataclasses import dataclass, field

from fastalign.ranks.config import ParallelConfig
from fastalign.runs.config import (
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    RunConfig,
    TrainConfig,
)
from fastalign.trainers.dpo.losses import DPOLoss, PreferenceLoss


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that the policy is held near."""

    path: str | None = None
    """Folder or hub name; default: the model that training starts from."""
    cache_dir: str | None = None
    """Where reference log-probs are kept between runs; default: fastalign in the user's cache."""
    offload: bool = False
    """Keep the weights of another model in host memory; its layers visit the device one by one."""

    def __post_init__(self) -> None:
        if self.offload and self.path is None:
            raise ValueError(
                "reference.offload: needs --reference.path; without it the reference is the model "
                "that training starts from"
            )


@dataclass(frozen=True)
class DPOConfig:
    """DPO and its relatives."""

    model: ModelConfig
    data: PreferenceDataConfig
    run: RunConfig
    loss: PreferenceLoss = field(default_factory=DPOLoss)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
