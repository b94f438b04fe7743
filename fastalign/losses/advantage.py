"""Advantages of whole responses from the scores of a prompt's n samples, and whitening."""

from torch import Tensor


def rloo_advantage(
    score: Tensor,  # (R,)
    num_samples: int,
) -> Tensor:
    """REINFORCE leave-one-out (Kool et al. 2019; arXiv 2402.14740), (R,).

    r_i less the mean of the other samples of its prompt.

    Args:
        score: Of each response; the n samples of one prompt lie next to each other.
        num_samples: n, of every prompt.

    Raises:
        ValueError: n below 2, or scores that are not n of each prompt.
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
    """GRPO's group-relative advantages (arXiv 2402.03300, section 4.1.2), (R,).

    (r_i - mean) / (std + eps), of each prompt's n samples.

    Args:
        score: Of each response; the n samples of one prompt lie next to each other.
        num_samples: n, of every prompt.
        eps: Keeps a group of equal scores at 0; the standard deviation is the sample's (n - 1).

    Raises:
        ValueError: n below 2, or scores that are not n of each prompt.
    """
    group = _grouped(score, num_samples)
    centred = group - group.mean(1, keepdim=True)
    return (centred / (group.std(1, keepdim=True) + eps)).flatten()


def whiten(values: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Values of standard deviation 1, and of mean 0 if `shift_mean`; in the same shape.

    (x - mean) / sqrt(var + eps) [+ mean], as in openai/lm-human-preferences, the code of
    arXiv 1909.08593, which shifts advantages and leaves rewards their mean.
    """
    mean = values.double().mean()
    white = (values - mean) * whitening_scale(values, eps=eps)
    return (white if shift_mean else white + mean).to(values.dtype)


def whitening_scale(values: Tensor, *, eps: float = 1e-8) -> Tensor:
    """What `whiten` multiplies by: 1 / sqrt(var + eps), () float64."""
    return (values.double().var(correction=0) + eps).rsqrt()


def _grouped(score: Tensor, num_samples: int) -> Tensor:
    """(R / n, n)."""
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 of each prompt, got {num_samples}")
    if score.ndim != 1 or score.numel() % num_samples:
        raise ValueError(
            f"score: expected (R,) with {num_samples} for each prompt, got {tuple(score.shape)}"
        )
    return score.view(-1, num_samples)
