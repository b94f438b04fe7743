"""Losses: one pure function a formula, per item and unreduced, torch only."""

from fastalign.losses.advantage import grpo_advantage, rloo_advantage, whiten, whitening_scale
from fastalign.losses.formulas import formula
from fastalign.losses.policy import importance_weight, negative_logprob, ppo_clip, value_clipped
from fastalign.losses.preference import (
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
from fastalign.ops.preference_loss import PairLogprobs
from fastalign.ops.segments import segment_sum

__all__ = [
    "PairLogprobs",
    "bradley_terry",
    "bradley_terry_votes",
    "davidson",
    "davidson_outcomes",
    "davidson_votes",
    "dpo",
    "dpo_davidson",
    "dpo_label_smoothed",
    "dpo_length_normalised",
    "dpo_length_penalised",
    "dpo_rao_kupper",
    "dpo_robust",
    "formula",
    "grpo_advantage",
    "hinge",
    "importance_weight",
    "ipo_mean",
    "ipo_sum",
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
]
