"""Advantages of whole responses from the scores of a prompt's samples, and whitening.

`score` (R,) is of each response, a prompt's responses adjacent; `num_samples` are the responses of
each prompt: a number, or one for each prompt where their groups differ in size. A ValueError says
if one is below 2, or they do not make R.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NumSamples = int | Sequence[int]


def rloo_advantage(
    score: Tensor,  # (R,)
    num_samples: NumSamples,
) -> Tensor:
    """Return REINFORCE leave-one-out advantages (Kool et al. 2019; arXiv 2402.14740), (R,).

    Each is the response's score minus the mean score of its prompt's other responses.
    """

    def of_groups(group: Tensor) -> Tensor:  # (G, n)
        others = (group.sum(1, keepdim=True) - group) / (group.shape[1] - 1)
        return group - others

    return _by_group(of_groups, score, num_samples)


def grpo_advantage(
    score: Tensor,  # (R,)
    num_samples: NumSamples,
    *,
    eps: float = 1e-4,
) -> Tensor:
    """Return GRPO's group-relative advantages (arXiv 2402.03300, section 4.1.2), (R,).

    Each is (r_i - mean) / (std + eps) over its prompt's responses; the standard deviation is the
    sample's, with num_samples - 1. By `eps` equal scores give advantages of 0.
    """

    def of_groups(group: Tensor) -> Tensor:  # (G, n)
        centred = group - group.mean(1, keepdim=True)
        return centred / (group.std(1, keepdim=True) + eps)

    return _by_group(of_groups, score, num_samples)


def dr_grpo_advantage(
    score: Tensor,  # (R,)
    num_samples: NumSamples,
) -> Tensor:
    """Return the scores less the mean of their prompt's responses (arXiv 2503.20783, eq. 4), (R,).

    Without GRPO's division by the deviation, which weights prompts that are nearly always or
    nearly never solved more than others.
    """
    return _by_group(lambda group: group - group.mean(1, keepdim=True), score, num_samples)


def whiten(values: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale values to standard deviation 1 and, with `shift_mean`, shift them to mean 0.

    Return (x - mean) / sqrt(var + eps) [+ mean] in the shape and dtype of `values`, as in
    openai/lm-human-preferences, the code of arXiv 1909.08593, which shifts advantages but not
    rewards. The variance is the population's, over N; TRL and verl take the sample's, over N - 1:
    their result is smaller by sqrt((N - 1) / N).
    """
    mean = values.double().mean()
    white = (values - mean) * whitening_scale(values, eps=eps)
    return (white if shift_mean else white + mean).to(values.dtype)


def whitening_scale(values: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return the factor of `whiten`, 1 / sqrt(var + eps), () float64."""
    return (values.double().var(correction=0) + eps).rsqrt()


def _by_group(
    of_groups: Callable[[Tensor], Tensor], score: Tensor, num_samples: NumSamples
) -> Tensor:
    """Apply a function of groups of one size, (G, n), to each prompt's scores; return (R,)."""
    sizes = [num_samples] if isinstance(num_samples, int) else list(num_samples)
    for size in sizes:
        if size < 2:
            raise ValueError(f"num_samples: expected at least 2 of each prompt, got {size}")
    if isinstance(num_samples, int):
        if score.ndim != 1 or score.numel() % num_samples:
            raise ValueError(
                f"score: expected (R,) with {num_samples} for each prompt, got {tuple(score.shape)}"
            )
        return of_groups(score.view(-1, num_samples)).flatten()
    if score.shape != (sum(sizes),):
        raise ValueError(
            f"score: expected ({sum(sizes)},), the sum of num_samples, got {tuple(score.shape)}"
        )
    parts = torch.split(score, sizes)
    return torch.cat([score[:0], *(of_groups(group[None])[0] for group in parts)])
