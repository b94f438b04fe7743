"""Evaluation: accuracy on pairs, reward and KL of samples, win rate, best of n, the report."""

from fastalign.evaluation.best_of_n import best_of_n, best_of_n_kl_bound, best_of_n_reward
from fastalign.evaluation.logprobs import sequence_logprobs
from fastalign.evaluation.measures import mean_margin, preference_accuracy, sampled_kl
from fastalign.evaluation.reward_model import ModelReward
from fastalign.evaluation.rewards import BagOfWordsReward, apply_reward, load_reward
from fastalign.evaluation.statistics import (
    Estimate,
    Interval,
    estimate,
    estimate_of_groups,
    share_interval,
)
from fastalign.evaluation.win_rate import (
    AnswerPair,
    Judged,
    judge_by_reward,
    pair_answers,
    win_rate,
)

__all__ = [
    "AnswerPair",
    "BagOfWordsReward",
    "Estimate",
    "Interval",
    "Judged",
    "ModelReward",
    "apply_reward",
    "best_of_n",
    "best_of_n_kl_bound",
    "best_of_n_reward",
    "estimate",
    "estimate_of_groups",
    "judge_by_reward",
    "load_reward",
    "mean_margin",
    "pair_answers",
    "preference_accuracy",
    "sampled_kl",
    "sequence_logprobs",
    "share_interval",
    "win_rate",
]
