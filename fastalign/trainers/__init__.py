"""Trainers: a file or a folder for each algorithm, whose loop is in its `train.py`."""

from typing import TYPE_CHECKING

from fastalign.lazy_names import imported_on_use

if TYPE_CHECKING:
    from fastalign.ranks.config import ParallelConfig
    from fastalign.runs.config import (
        DataConfig,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        PreferenceDataConfig,
        RunConfig,
        SFTConfig,
        TrainConfig,
    )
    from fastalign.runs.loop import RunResult
    from fastalign.trainers.dpo.config import LOSSES, DPOConfig, PreferenceLoss, ReferenceConfig
    from fastalign.trainers.dpo.train import dpo_run, train_dpo
    from fastalign.trainers.online_dpo.config import (
        FreshPairsConfig,
        OnlineDPOConfig,
        OnlineReferenceConfig,
    )
    from fastalign.trainers.online_dpo.train import online_dpo_run, train_online_dpo
    from fastalign.trainers.ppo.advantages import ADVANTAGES, Gae, Grpo, Rloo
    from fastalign.trainers.ppo.config import (
        KL_PENALTIES,
        KLInLoss,
        KLInReward,
        PPOConfig,
        PPOSettings,
        ValueConfig,
    )
    from fastalign.trainers.ppo.train import ppo_run, train_ppo
    from fastalign.trainers.reward.config import REWARD_LOSSES, RewardConfig, RewardLoss
    from fastalign.trainers.reward.train import reward_run, train_reward
    from fastalign.trainers.sampling.config import (
        FrozenReferenceConfig,
        PromptDataConfig,
        RewardSourceConfig,
        WatchConfig,
    )
    from fastalign.trainers.sft import sft_run, train_sft

__getattr__ = imported_on_use(__name__)

__all__ = [
    "ADVANTAGES",
    "KL_PENALTIES",
    "LOSSES",
    "REWARD_LOSSES",
    "DPOConfig",
    "DataConfig",
    "FreshPairsConfig",
    "FrozenReferenceConfig",
    "Gae",
    "Grpo",
    "KLInLoss",
    "KLInReward",
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
    "Rloo",
    "RunConfig",
    "RunResult",
    "SFTConfig",
    "TrainConfig",
    "ValueConfig",
    "WatchConfig",
    "dpo_run",
    "online_dpo_run",
    "ppo_run",
    "reward_run",
    "sft_run",
    "train_dpo",
    "train_online_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]
