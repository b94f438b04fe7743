"""Policy-gradient losses, per token."""

import torch
from torch import Tensor


def ppo_clip(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
) -> Tensor:
    """PPO's clipped objective, negated (arXiv 1707.06347, eq. 7), (T,).

    -min(r A, clip(r, 1 - clip_range, 1 + clip_range) A), r = exp(logprob - old_logprob).

    Args:
        logprob: Of the sampled tokens under the policy.
        old_logprob: Under the policy that sampled; no gradient flows.
        advantage: No gradient flows.
        clip_range: Epsilon, in (0, 1).

    Returns:
        One loss a token.

    Raises:
        ValueError: Shapes that differ, or a clip range outside (0, 1).
    """
    for name, value in (("old_logprob", old_logprob), ("advantage", advantage)):
        if value.shape != logprob.shape:
            raise ValueError(f"{name}: expected {tuple(logprob.shape)}, got {tuple(value.shape)}")
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range: expected a number in (0, 1), got {clip_range}")
    ratio = (logprob - old_logprob.detach()).exp()
    advantage = advantage.detach()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)
