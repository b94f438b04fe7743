"""Trainers: one file an algorithm, a flat loop, and functions that they share."""

from fastalign.ranks.config import ParallelConfig
from fastalign.runs.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    RunConfig,
    TrainConfig,
)
from fastalign.runs.task import RunResult
from fastalign.trainers.dpo.config import DPOConfig, ReferenceConfig
from fastalign.trainers.dpo.losses import LOSSES, PreferenceLoss
from fastalign.trainers.dpo.train import train_dpo
from fastalign.trainers.online_dpo.config import (
    FreshPairsConfig,
    OnlineDPOConfig,
    OnlineReferenceConfig,
)
from fastalign.trainers.online_dpo.train import train_online_dpo
from fastalign.trainers.ppo.config import KLConfig, PPOConfig, PPOSettings, ValueConfig
from fastalign.trainers.ppo.train import train_ppo
from fastalign.trainers.reward.config import RewardConfig
from fastalign.trainers.reward.losses import REWARD_LOSSES, RewardLoss
from fastalign.trainers.reward.train import train_reward
from fastalign.trainers.sampling.config import (
    FrozenReferenceConfig,
    PromptDataConfig,
    RewardSourceConfig,
    WatchConfig,
)
from fastalign.trainers.sft import SFTConfig, train_sft

__all__ = [
    "LOSSES",
    "REWARD_LOSSES",
    "DPOConfig",
    "DataConfig",
    "FreshPairsConfig",
    "FrozenReferenceConfig",
    "KLConfig",
    "LoraConfig",
    "ModelConfig",
    "OnlineDPOConfig",
    "OnlineReferenceConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOSettings",
    "ParallelConfig",
    "PreferenceDataConfig",
    "PreferenceLoss",
    "PromptDataConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardLoss",
    "RewardSourceConfig",
    "RunConfig",
    "RunResult",
    "SFTConfig",
    "TrainConfig",
    "ValueConfig",
    "WatchConfig",
    "train_dpo",
    "train_online_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]
