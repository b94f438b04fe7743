"""fastalign: align language models with human preferences, on fused log-prob kernels.

The drop-in functions are here; `fastalign.losses` holds the formulas, `fastalign.ops` the
operations, `fastalign.trainers` what `fastalign sft` and `fastalign dpo` run.
"""

from typing import TYPE_CHECKING

from fastalign.lazy_names import imported_on_use

if TYPE_CHECKING:
    from fastalign import fused as fused
    from fastalign import losses as losses
    from fastalign import ops as ops
    from fastalign.fused import (
        fused_linear_dpo_loss,
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

__getattr__ = imported_on_use(__name__)

__all__ = [
    "LinearHead",
    "LoraWeights",
    "VocabularyShard",
    "fused_linear_dpo_loss",
    "fused_linear_loss",
    "fused_linear_ppo_loss",
    "fused_linear_preference_loss",
    "fused_linear_sft_loss",
    "linear_logprob",
    "sequence_logprob",
    "token_logprob",
]
