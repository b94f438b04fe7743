"""Evaluation: accuracy on pairs, reward and KL of samples, and the report."""

from fastalign.evaluation.judged_pairs import JudgedPairs, pair_measures, with_tie_rate
from fastalign.evaluation.logprobs import of_responses, sequence_logprobs
from fastalign.evaluation.measures import mean_margin, preference_accuracy, sampled_kl
from fastalign.evaluation.pair_baselines import BagOfWordsBaseline, longer_wins
from fastalign.evaluation.reward_model import ModelReward
from fastalign.evaluation.rewards import BagOfWordsReward, apply_reward, load_reward
from fastalign.evaluation.statistics import Estimate, estimate, estimate_of_groups, summary

__all__ = [
    "BagOfWordsBaseline",
    "BagOfWordsReward",
    "Estimate",
    "JudgedPairs",
    "ModelReward",
    "apply_reward",
    "estimate",
    "estimate_of_groups",
    "load_reward",
    "longer_wins",
    "mean_margin",
    "of_responses",
    "pair_measures",
    "preference_accuracy",
    "sampled_kl",
    "sequence_logprobs",
    "summary",
    "with_tie_rate",
]
