"""`preference_loss`: per-token log-probs to the loss of each preference pair, and its gradient."""

from fastalign.ops.preference_loss.api import preference_loss
from fastalign.ops.preference_loss.formula import LinkFunction, PairLink, PreferenceFormula
from fastalign.ops.preference_loss.pairs import PairLogprobs

__all__ = ["LinkFunction", "PairLink", "PairLogprobs", "PreferenceFormula", "preference_loss"]
