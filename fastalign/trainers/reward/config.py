"""Settings of reward-model training."""

from dataclasses import dataclass, field

from fastalign.ranks.config import ParallelConfig
from fastalign.runs.config import (
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    RunConfig,
    TrainConfig,
    require,
)
from fastalign.trainers.reward.losses import BradleyTerryLoss, RewardLoss


@dataclass(frozen=True)
class RewardConfig:
    """Reward-model training on comparisons."""

    model: ModelConfig
    data: PreferenceDataConfig
    run: RunConfig
    loss: RewardLoss = field(default_factory=BradleyTerryLoss)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        rank = self.model.lora.rank
        require(rank == 0, "model.lora.rank", "0, a reward model being trained whole", rank)
