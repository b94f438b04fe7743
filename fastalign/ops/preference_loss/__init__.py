"""`preference_loss`: the loss of each preference pair, from per-token log-probs."""

from fastalign.ops.preference_loss.api import preference_loss
from fastalign.ops.preference_loss.formula import LinkFunction, PairLink, PreferenceFormula
from fastalign.ops.preference_loss.pairs import PairLogprobs

__all__ = ["LinkFunction", "PairLink", "PairLogprobs", "PreferenceFormula", "preference_loss"]
