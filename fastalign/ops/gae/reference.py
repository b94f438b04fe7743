"""The definition of `gae`, in PyTorch, in the dtype of its arguments.

Legend: N tokens of R responses.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `gae`, as every backend takes them."""

    reward: Tensor  # (N,)
    value: Tensor  # (N,)
    bounds: Tensor  # (R + 1,) int64
    bootstrap_value: Tensor | None  # (R,)
    gamma: float
    gae_lambda: float
    backend: str


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Return advantages and returns, by one step a token of the longest response.

    All responses are computed at once, from the last token of each to its first. The longest
    length is read on the host, so a GPU is waited for.
    """
    reward, value, bounds, bootstrap_value, gamma, gae_lambda, _ = inputs
    lengths, last = bounds.diff(), bounds[1:] - 1
    ending = lengths > 0
    next_value = torch.cat([value[1:], value.new_zeros(1)])[: len(value)]
    next_value[last[ending]] = 0.0 if bootstrap_value is None else bootstrap_value[ending]
    delta = reward + gamma * next_value - value
    advantage = delta.clone()
    longest = int(lengths.max()) if len(lengths) else 0
    for step in range(1, longest):
        token = last[lengths > step] - step
        advantage[token] = delta[token] + gamma * gae_lambda * advantage[token + 1]
    return advantage, advantage + value
