"""Drop-in fused losses: from hidden states to a loss, for a trainer of your own.

Each is `fused_linear_loss` with a formula of `fastalign.losses`: exact, with the gradient computed
in the forward, and without the (T, V) logits. For another preference loss, pass it to
`fused_linear_preference_loss`; for another kind, write a loss function for `fused_linear_loss`.
"""

from fastalign.fused.kto import fused_linear_kto_loss
from fastalign.fused.metrics import metric_means
from fastalign.fused.policy import fused_linear_ppo_loss, sequence_logprob
from fastalign.fused.preference import fused_linear_dpo_loss, fused_linear_preference_loss
from fastalign.fused.sft import fused_linear_sft_loss
from fastalign.losses.chunk_losses import (
    PairLoss,
    kto_loss_fn,
    ppo_loss_fn,
    preference_loss_fn,
    sft_loss_fn,
)

__all__ = [
    "PairLoss",
    "fused_linear_dpo_loss",
    "fused_linear_kto_loss",
    "fused_linear_ppo_loss",
    "fused_linear_preference_loss",
    "fused_linear_sft_loss",
    "kto_loss_fn",
    "metric_means",
    "ppo_loss_fn",
    "preference_loss_fn",
    "sequence_logprob",
    "sft_loss_fn",
]
