"""Losses: one pure function a formula, per item and unreduced, torch only."""

from fastalign.losses.advantage import (
    dr_grpo_advantage,
    grpo_advantage,
    rloo_advantage,
    whiten,
    whitening_scale,
)
from fastalign.losses.formulas import formula
from fastalign.losses.log_ratio_pairs import (
    apo_down,
    apo_zero,
    dpo_alpha_divergence,
    dpo_forward_kl,
    dpo_jensen_shannon,
)
from fastalign.losses.policy import (
    cispo,
    gspo_clip,
    importance_weight,
    masked_importance_weight,
    negative_logprob,
    ppo_clip,
    value_clipped,
)
from fastalign.losses.preference import (
    cpo,
    dpo,
    dpo_davidson,
    dpo_label_smoothed,
    dpo_length_normalised,
    dpo_length_penalised,
    dpo_rao_kupper,
    dpo_robust,
    hinge,
    ipo_mean,
    ipo_sum,
    orpo,
    simpo,
)
from fastalign.losses.reward import (
    bradley_terry,
    bradley_terry_votes,
    davidson,
    davidson_outcomes,
    davidson_votes,
    rao_kupper,
    rao_kupper_outcomes,
    rao_kupper_votes,
)
from fastalign.losses.supervised import cross_entropy, z_loss
from fastalign.losses.unpaired import kto, kto_kl
from fastalign.ops.preference_loss import PairLogprobs
from fastalign.ops.segments import segment_sum

__all__ = [
    "PairLogprobs",
    "apo_down",
    "apo_zero",
    "bradley_terry",
    "bradley_terry_votes",
    "cispo",
    "cpo",
    "cross_entropy",
    "davidson",
    "davidson_outcomes",
    "davidson_votes",
    "dpo",
    "dpo_alpha_divergence",
    "dpo_davidson",
    "dpo_forward_kl",
    "dpo_jensen_shannon",
    "dpo_label_smoothed",
    "dpo_length_normalised",
    "dpo_length_penalised",
    "dpo_rao_kupper",
    "dpo_robust",
    "dr_grpo_advantage",
    "formula",
    "grpo_advantage",
    "gspo_clip",
    "hinge",
    "importance_weight",
    "ipo_mean",
    "ipo_sum",
    "kto",
    "kto_kl",
    "masked_importance_weight",
    "negative_logprob",
    "orpo",
    "ppo_clip",
    "rao_kupper",
    "rao_kupper_outcomes",
    "rao_kupper_votes",
    "rloo_advantage",
    "segment_sum",
    "simpo",
    "value_clipped",
    "whiten",
    "whitening_scale",
    "z_loss",
]
