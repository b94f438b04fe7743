"""Scores of a reward model: a sequence classifier of transformers with one label, no bias.

The score of a response is read at its last token by position. transformers' own forward finds
that token as the last one that is not `config.pad_token_id`, so a saved model needs a pad token
that no response ends with (`set_pad_token`).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models.architecture import backbone
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import hidden_at
from fastalign.models.lora import adapter_active, adapter_parts

# Name of the head (1, D) on a policy whose own hidden states give the values, too.
VALUE_HEAD = "value_head"


class AdapterModel(nn.Module):
    """A reward or value model on another model's frozen base: an adapter of its own, and a head.

    Its submodules are the parts of the adapter, which lie in the owner's layers, and the head
    `score`, float32 zeros at first. `score_at` computes with the adapter; where a backward computes
    activations again, `as_itself` has to be around it, too.

    Args:
        owner: a causal model that has the adapter.
        name: the adapter's name in peft.
    """

    owner: Any

    def __init__(self, owner: Any, name: str):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # registered, its weights would be this model's
        self.name = name
        self.adapter = nn.ModuleList(adapter_parts(owner, name))
        self.score = new_head(owner)
        self.config = copy.deepcopy(owner.config)

    @property
    def base_model(self) -> Any:
        """The owner without its head, as transformers' models name it."""
        return backbone(self.owner)

    def get_input_embeddings(self) -> Any:
        """Return the owner's embedding."""
        return self.owner.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """Return None, as transformers' sequence classifiers do."""


def new_head(model: Any) -> nn.Linear:
    """Return a head (1, D) of zeros, at least float32, for a causal model's hidden states."""
    weight = model.get_output_embeddings().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=dtype)
    nn.init.zeros_(head.weight)
    return head


def add_value_head(policy: Any) -> None:
    """Add a head of zeros that reads values from the policy's hidden states (`VALUE_HEAD`)."""
    policy.add_module(VALUE_HEAD, new_head(policy))


@contextmanager
def as_itself(model: Any) -> Iterator[None]:
    """Switch the owner of an `AdapterModel` to its adapter in the context; others stay as is."""
    if not isinstance(model, AdapterModel):
        yield
        return
    with adapter_active(model.owner, model.name):
        yield


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
    with as_itself(model):
        hidden = hidden_at(model, batch, positions, compute, plan)
    return score_of(model, hidden)


def score_of(model: Any, hidden: Tensor) -> Tensor:
    """Return the score (K,) of hidden states (K, D); of a policy, that of its value head."""
    weight = getattr(model, VALUE_HEAD, None)
    weight = (model.score if weight is None else weight).weight[0]
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
    """Set the pad token of the configuration; a new token gets an embedding of zeros.

    That of a shared base stays as it is: who loads an `AdapterModel` by itself gets the embedding.
    """
    if isinstance(model, AdapterModel):
        model.config.pad_token_id = pad_token_id
        return
    before = model.get_input_embeddings().weight
    num_rows, trained = before.shape[0], before.requires_grad
    if pad_token_id >= num_rows:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        after = model.get_input_embeddings().weight
        after[num_rows:] = 0  # padding is masked everywhere
        after.requires_grad_(trained)
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
