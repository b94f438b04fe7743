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
from fastalign.trainers.loop import RunResult
from fastalign.trainers.lora_config import LoraConfig
from fastalign.trainers.preference_losses import LOSSES, PreferenceLoss
from fastalign.trainers.reward import train_reward
from fastalign.trainers.reward_losses import REWARD_LOSSES, RewardLoss
from fastalign.trainers.sft import train_sft

__all__ = [
    "LOSSES",
    "REWARD_LOSSES",
    "DPOConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PreferenceDataConfig",
    "PreferenceLoss",
    "ReferenceConfig",
    "RewardConfig",
    "RewardLoss",
    "RunConfig",
    "RunResult",
    "SFTConfig",
    "TrainConfig",
    "train_dpo",
    "train_reward",
    "train_sft",
]
