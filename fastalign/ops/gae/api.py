"""`gae`: advantages and returns of PPO.

Legend: N tokens of R responses, packed end to end.
"""

import torch
from torch import Tensor

from fastalign.ops.backends import BackendName, choose_backend
from fastalign.ops.gae.op import gae_forward
from fastalign.ops.packed_arguments import check_packed, compute_dtype


def gae(
    reward: Tensor,  # (N,)
    value: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,) integer
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap_value: Tensor | None = None,  # (R,)
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by GAE (arXiv 1506.02438, eq. 16), for packed responses.

    Equivalent to these lines for each response of T tokens, in one pass over all responses:

        next_value = cat([value[1:], bootstrap_value])
        delta = reward + gamma * next_value - value
        advantage = zeros(T + 1)
        for t in reversed(range(T)):
            advantage[t] = delta[t] + gamma * gae_lambda * advantage[t + 1]
        returns = advantage[:T] + value

    No gradient flows: advantages and returns are data to PPO. Kernels compute in float64 and round
    once. Every token of a response counts in the sum; leave out untrained tokens before packing.

    Args:
        reward: reward of each token: float32, bfloat16, float16, or float64 (reference only).
        value: value of each token's state, before the token is taken.
        bounds: token bounds that rise from 0 to N; response r is bounds[r]..bounds[r + 1].
        gamma: discount factor, in [0, 1].
        gae_lambda: weight of longer returns, in [0, 1].
        bootstrap_value: value after each response's last token, for responses that were cut off;
            None: 0, as for responses that ended.
        backend: "auto" takes native code where it was built, else Triton on a GPU, else the
            reference; a named backend runs or raises.

    Returns:
        (advantage, returns), each (N,), in float32 (float64 for float64 rewards).

    Raises:
        ValueError: if a shape, dtype, device or number is wrong, or the backend is unusable; on a
            CPU, also if bounds are wrong.
    """
    check_packed(bounds, {"reward": reward, "value": value}, {"bootstrap_value": bootstrap_value})
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number}")
    dtype = compute_dtype(reward)
    advantage, returns = gae_forward(
        reward.detach().to(dtype),
        value.detach().to(dtype),
        bounds.to(torch.int64),
        None if bootstrap_value is None else bootstrap_value.detach().to(dtype),
        float(gamma),
        float(gae_lambda),
        choose_backend("gae", backend, reward.device.type, reward.dtype),
    )
    return advantage, returns
