"""Trainers: a file or a folder for each algorithm, whose loop is in its `train.py`."""

from typing import TYPE_CHECKING

from fastalign.lazy_names import imported_on_use

if TYPE_CHECKING:
    from fastalign.ranks.config import ParallelConfig
    from fastalign.runs.best import RunResult
    from fastalign.runs.config import (
        DataConfig,
        JSDLoss,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        PreferenceDataConfig,
        ReferenceConfig,
        RunConfig,
        SFTConfig,
        SFTLoss,
        TeacherConfig,
        TrainConfig,
        UnpairedDataConfig,
    )
    from fastalign.trainers.dpo.config import LOSSES, DPOConfig, PreferenceLoss
    from fastalign.trainers.dpo.train import dpo_run, train_dpo
    from fastalign.trainers.kto.config import KTOConfig, KTOLoss
    from fastalign.trainers.kto.train import kto_run, train_kto
    from fastalign.trainers.online_dpo.config import (
        FreshPairsConfig,
        OnlineDPOConfig,
        OnlineReferenceConfig,
    )
    from fastalign.trainers.online_dpo.train import online_dpo_run, train_online_dpo
    from fastalign.trainers.ppo.advantages import (
        ADVANTAGES,
        IMPORTANCE,
        LOSS_MEANS,
        POLICY_LOSSES,
        Cispo,
        Clip,
        ConstantMean,
        DrGrpo,
        Gae,
        Grpo,
        Gspo,
        Masked,
        Rloo,
        SequenceMasked,
        SequenceMean,
        SequenceTruncated,
        TokenMean,
        Truncated,
        Unweighted,
    )
    from fastalign.trainers.ppo.config import (
        GRPO_ADVANTAGES,
        GRPO_KL_PENALTIES,
        KL_PENALTIES,
        RLOO_ADVANTAGES,
        GRPOConfig,
        GRPOSettings,
        KLInLoss,
        KLInReward,
        PPOConfig,
        PPOSettings,
        RLOOConfig,
        RLOOSettings,
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
    "GRPO_ADVANTAGES",
    "GRPO_KL_PENALTIES",
    "IMPORTANCE",
    "KL_PENALTIES",
    "LOSSES",
    "LOSS_MEANS",
    "POLICY_LOSSES",
    "REWARD_LOSSES",
    "RLOO_ADVANTAGES",
    "Cispo",
    "Clip",
    "ConstantMean",
    "DPOConfig",
    "DataConfig",
    "DrGrpo",
    "FreshPairsConfig",
    "FrozenReferenceConfig",
    "GRPOConfig",
    "GRPOSettings",
    "Gae",
    "Grpo",
    "Gspo",
    "JSDLoss",
    "KLInLoss",
    "KLInReward",
    "KTOConfig",
    "KTOLoss",
    "LoraConfig",
    "Masked",
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
    "RLOOConfig",
    "RLOOSettings",
    "ReferenceConfig",
    "RewardConfig",
    "RewardLoss",
    "RewardSourceConfig",
    "Rloo",
    "RunConfig",
    "RunResult",
    "SFTConfig",
    "SFTLoss",
    "SequenceMasked",
    "SequenceMean",
    "SequenceTruncated",
    "TeacherConfig",
    "TokenMean",
    "TrainConfig",
    "Truncated",
    "UnpairedDataConfig",
    "Unweighted",
    "ValueConfig",
    "WatchConfig",
    "dpo_run",
    "kto_run",
    "online_dpo_run",
    "ppo_run",
    "reward_run",
    "sft_run",
    "train_dpo",
    "train_kto",
    "train_online_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]
