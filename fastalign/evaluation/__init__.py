"""Evaluation: accuracy on pairs, reward and KL of samples, and the report."""

from fastalign.evaluation.logprobs import sequence_logprobs
from fastalign.evaluation.measures import mean_margin, preference_accuracy, sampled_kl
from fastalign.evaluation.reward_model import ModelReward
from fastalign.evaluation.rewards import BagOfWordsReward, apply_reward, load_reward
from fastalign.evaluation.statistics import Estimate, estimate, estimate_of_groups

__all__ = [
    "BagOfWordsReward",
    "Estimate",
    "ModelReward",
    "apply_reward",
    "estimate",
    "estimate_of_groups",
    "load_reward",
    "mean_margin",
    "preference_accuracy",
    "sampled_kl",
    "sequence_logprobs",
]
