"""fastalign: align language models with human preferences, on fused log-prob kernels.

The drop-in functions are here, and the functions that train, from objects or paths: `train_dpo` and
its like, and `dpo_run` and its like for a loop of one's own. `fastalign.losses` holds the formulas,
`fastalign.ops` the operations, `fastalign.trainers` the settings of training.
"""

from typing import TYPE_CHECKING

from fastalign.lazy_names import imported_on_use

if TYPE_CHECKING:
    from fastalign import fused as fused
    from fastalign import losses as losses
    from fastalign import ops as ops
    from fastalign.fused import (
        fused_linear_dpo_loss,
        fused_linear_kto_loss,
        fused_linear_ppo_loss,
        fused_linear_preference_loss,
        fused_linear_sft_loss,
        sequence_logprob,
    )
    from fastalign.ops import (
        LinearHead,
        LoraWeights,
        VocabularyShard,
        fused_linear_loss,
        linear_logprob,
        token_logprob,
    )
    from fastalign.trainers.dpo.train import dpo_run, train_dpo
    from fastalign.trainers.kto.train import kto_run, train_kto
    from fastalign.trainers.online_dpo.train import online_dpo_run, train_online_dpo
    from fastalign.trainers.ppo.train import ppo_run, train_ppo
    from fastalign.trainers.reward.train import reward_run, train_reward
    from fastalign.trainers.sft import sft_run, train_sft

__getattr__ = imported_on_use(__name__)

__all__ = [
    "LinearHead",
    "LoraWeights",
    "VocabularyShard",
    "dpo_run",
    "fused_linear_dpo_loss",
    "fused_linear_kto_loss",
    "fused_linear_loss",
    "fused_linear_ppo_loss",
    "fused_linear_preference_loss",
    "fused_linear_sft_loss",
    "kto_run",
    "linear_logprob",
    "online_dpo_run",
    "ppo_run",
    "reward_run",
    "sequence_logprob",
    "sft_run",
    "token_logprob",
    "train_dpo",
    "train_kto",
    "train_online_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]
