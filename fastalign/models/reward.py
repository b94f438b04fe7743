"""Scores of a reward model: a sequence classifier of transformers with one label, no bias.

The score of a response is read at its last token by position. transformers' own forward finds
that token as the last one that is not `config.pad_token_id`, so a saved model needs a pad token
that no response ends with (`set_pad_token`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import hidden_at


def score_at(
    model: Any,
    batch: PackedBatch,
    positions: Tensor,
    compute: Compute,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Return the score at K positions of the packed row: rewards or values.

    `positions` are (K,) int64; for the plan see `hidden_at`.

    Returns:
        (K,) float32 (float64 for a float64 model), under autocast too.
    """
    hidden = hidden_at(model, batch, positions, compute, plan)
    weight = model.score.weight[0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.mv(hidden.to(wide), weight.to(wide))


def response_reward(
    model: Any, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None = None
) -> Tensor:
    """Return the score (R,) at each response's last token; see `score_at`."""
    return score_at(model, batch, batch.response_bounds[:, 1] - 1, compute, plan)


@torch.no_grad()
def set_pad_token(model: Any, pad_token_id: int) -> None:
    """Set the pad token of the configuration; a new token gets an embedding of zeros."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    if pad_token_id >= num_rows:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        model.get_input_embeddings().weight[num_rows:] = 0  # padding is masked everywhere
    model.config.pad_token_id = pad_token_id


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of scores: of a reward model's on responses it was trained on.

    Those are stored in the model's `config.json` rather than folded into the head, which has no
    bias: so every program serves the same raw score.
    """

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, score: Tensor) -> Tensor:
        """Return (score - mean) / std."""
        return (score - self.mean) / self.std


def reward_scale(model: Any) -> RewardScale:
    """Read the scale from the model's configuration; without one, mean 0 and std 1.

    Raises:
        ValueError: if the mean is not finite, or the std not a finite number above 0.
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
    """Write the mean and standard deviation of scores (N,) into the model's configuration.

    If all scores are equal, the std is set to 1.
    """
    mean, std = scores.double().mean().item(), scores.double().std(correction=0).item()
    model.config.reward_mean = mean
    model.config.reward_std = std if std > 0 else 1.0
