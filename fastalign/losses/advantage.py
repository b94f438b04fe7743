"""Advantages of whole responses from the scores of a prompt's samples, and whitening.

`score` (R,) is of each response, a prompt's responses adjacent; `num_samples` are the responses of
each prompt. A ValueError says if they are below 2, or R is no multiple of them.
"""

from torch import Tensor


def rloo_advantage(
    score: Tensor,  # (R,)
    num_samples: int,
) -> Tensor:
    """Return REINFORCE leave-one-out advantages (Kool et al. 2019; arXiv 2402.14740), (R,).

    Each is the response's score minus the mean score of its prompt's other responses.
    """
    group = _grouped(score, num_samples)
    others = (group.sum(1, keepdim=True) - group) / (num_samples - 1)
    return (group - others).flatten()


def grpo_advantage(
    score: Tensor,  # (R,)
    num_samples: int,
    *,
    eps: float = 1e-4,
) -> Tensor:
    """Return GRPO's group-relative advantages (arXiv 2402.03300, section 4.1.2), (R,).

    Each is (r_i - mean) / (std + eps) over its prompt's responses; the standard deviation is the
    sample's, with num_samples - 1. By `eps` equal scores give advantages of 0.
    """
    group = _grouped(score, num_samples)
    centred = group - group.mean(1, keepdim=True)
    return (centred / (group.std(1, keepdim=True) + eps)).flatten()


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


def _grouped(score: Tensor, num_samples: int) -> Tensor:
    """Return the scores as (R / num_samples, num_samples)."""
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 of each prompt, got {num_samples}")
    if score.ndim != 1 or score.numel() % num_samples:
        raise ValueError(
            f"score: expected (R,) with {num_samples} for each prompt, got {tuple(score.shape)}"
        )
    return score.view(-1, num_samples)
