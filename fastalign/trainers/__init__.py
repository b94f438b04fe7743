"""Trainers: one file an algorithm, a flat loop, and functions that they share."""

from fastalign.trainers.config import (
    DataConfig,
    DPOConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    ReferenceConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)
from fastalign.trainers.dpo import train_dpo
from fastalign.trainers.loop import RunResult
from fastalign.trainers.lora_config import LoraConfig
from fastalign.trainers.preference_losses import LOSSES, PreferenceLoss
from fastalign.trainers.sft import train_sft

__all__ = [
    "LOSSES",
    "DPOConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PreferenceDataConfig",
    "PreferenceLoss",
    "ReferenceConfig",
    "RunConfig",
    "RunResult",
    "SFTConfig",
    "TrainConfig",
    "train_dpo",
    "train_sft",
]
