"""Trainers: one file an algorithm, a flat loop, and functions that they share."""

from fastalign.trainers.config import (
    DataConfig,
    DPOConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    ReferenceConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)
from fastalign.trainers.dpo import train_dpo
from fastalign.trainers.lora_config import LoraConfig
from fastalign.trainers.online_config import (
    FreshPairsConfig,
    OnlineDPOConfig,
    OnlineReferenceConfig,
)
from fastalign.trainers.online_dpo import train_online_dpo
from fastalign.trainers.parallel_config import ParallelConfig
from fastalign.trainers.ppo import train_ppo
from fastalign.trainers.ppo_config import (
    FrozenReferenceConfig,
    KLConfig,
    PPOConfig,
    PPOSettings,
    ValueConfig,
    WatchConfig,
)
from fastalign.trainers.preference_losses import LOSSES, PreferenceLoss
from fastalign.trainers.reward import train_reward
from fastalign.trainers.reward_losses import REWARD_LOSSES, RewardLoss
from fastalign.trainers.rollout_config import PromptDataConfig, RewardSourceConfig
from fastalign.trainers.sft import train_sft
from fastalign.trainers.task import RunResult

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
