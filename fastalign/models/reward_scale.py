"""The scale of a reward model's scores, as its configuration holds it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of a reward model's scores on responses it was trained on.

    The head has no bias, and its weight stays as it was trained, so that every program serves the
    same raw score; these two numbers stand in the model's `config.json`.
    """

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, score: Tensor) -> Tensor:
        """(score - mean) / std."""
        return (score - self.mean) / self.std


def reward_scale(model: Any) -> RewardScale:
    """The scale in the model's configuration; without one, a raw score is the normalised one.

    Raises:
        ValueError: numbers that are no scale.
    """
    mean = getattr(model.config, "reward_mean", 0.0)
    std = getattr(model.config, "reward_std", 1.0)
    numbers = all(isinstance(value, int | float) for value in (mean, std))
    if not numbers or not math.isfinite(mean) or not 0 < std < math.inf:
        raise ValueError(
            "config.json: expected a finite reward_mean and a reward_std above 0, got "
            f"{mean!r} and {std!r}"
        )
    return RewardScale(mean, std)


def set_reward_scale(model: Any, scores: Tensor) -> None:
    """Writes the mean and standard deviation of scores (N,) into the model's configuration.

    Scores that are all the same have no scale: they are only shifted.
    """
    mean, std = scores.double().mean().item(), scores.double().std(correction=0).item()
    model.config.reward_mean = mean
    model.config.reward_std = std if std > 0 else 1.0
