"""Evaluation: accuracy on pairs, reward and KL of samples, win rate, best of n."""

from fastalign.evaluation.judged_pairs import JudgedPairs, pair_measures, with_tie_rate
from fastalign.evaluation.measures import (
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_reward,
    mean_margin,
    preference_accuracy,
    sampled_kl,
)
from fastalign.evaluation.pair_baselines import BagOfWordsBaseline, longer_wins
from fastalign.evaluation.rewards import (
    BagOfWordsReward,
    ModelReward,
    apply_reward,
    load_reward,
)
from fastalign.evaluation.statistics import (
    estimate,
    estimate_of_groups,
    share_interval,
    summary,
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
    "BagOfWordsBaseline",
    "BagOfWordsReward",
    "Judged",
    "JudgedPairs",
    "ModelReward",
    "apply_reward",
    "best_of_n",
    "best_of_n_kl_bound",
    "best_of_n_reward",
    "estimate",
    "estimate_of_groups",
    "judge_by_reward",
    "load_reward",
    "longer_wins",
    "mean_margin",
    "pair_answers",
    "pair_measures",
    "preference_accuracy",
    "sampled_kl",
    "share_interval",
    "summary",
    "win_rate",
    "with_tie_rate",
]
