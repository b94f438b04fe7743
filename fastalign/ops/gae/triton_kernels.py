"""The Triton kernel of `gae`: one program a response, which scans block after block from the end.

Arithmetic is float64: with gamma and lambda near 1 an advantage is a sum of thousands of terms.
"""

import struct

import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows
from fastalign.ops.gae.reference import Inputs

MAX_BLOCK = 1024


@triton.jit
def _then(a_first, b_first, a, b):
    """Compose x -> a_first x + b_first with x -> a x + b after it."""
    return a_first * a, a * b_first + b


@triton.jit
def _float64(high, low):
    return tl.full((), 0.0, tl.float64) + high + low


@triton.jit
def gae_kernel(
    reward_ptr,
    value_ptr,
    bounds_ptr,
    bootstrap_value_ptr,
    advantage_ptr,
    returns_ptr,
    gamma_high,
    gamma_low,
    decay_high,
    decay_low,
    HAS_BOOTSTRAP_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute A_t = delta_t + decay A_(t+1) for one response.

    Each token is a map x -> a x + b with a = decay and b = delta; a scan composes the maps of a
    block in parallel, and `carried` is the last advantage of the block before.
    """
    response = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + response)
    end = tl.load(bounds_ptr + response + 1)
    gamma = _float64(gamma_high, gamma_low)
    decay = _float64(decay_high, decay_low)
    following = 0.0
    if HAS_BOOTSTRAP_VALUE:
        following = tl.load(bootstrap_value_ptr + response)
    carried = tl.full((), 0.0, tl.float64)
    for start in range(0, end - begin, BLOCK):
        # Tokens are counted from the end, so that an ordinary scan runs backwards in time.
        place = tl.arange(0, BLOCK)
        token = end - 1 - start - place
        inside = token >= begin
        value = tl.load(value_ptr + token, mask=inside, other=0.0).to(tl.float64)
        is_last = token == end - 1
        next_value = tl.load(value_ptr + token + 1, mask=inside & (token < end - 1), other=0.0)
        next_value = tl.where(is_last, following, next_value).to(tl.float64)
        reward = tl.load(reward_ptr + token, mask=inside, other=0.0).to(tl.float64)
        b = tl.where(inside, reward + gamma * next_value - value, 0.0)
        a = tl.where(inside, decay, 1.0)
        a, b = tl.associative_scan((a, b), 0, _then)
        advantage = a * carried + b
        tl.store(advantage_ptr + token, advantage.to(tl.float32), mask=inside)
        tl.store(returns_ptr + token, (advantage + value).to(tl.float32), mask=inside)
        carried = tl.sum(tl.where(place == BLOCK - 1, advantage, 0.0), axis=0)


def _halves(number: float) -> tuple[float, float]:
    """Split a double into two floats that sum to it: Triton passes Python floats as float32."""
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:  # (N,), (N,) float32
    """Return advantages and returns."""
    num_tokens, num_responses = inputs.reward.shape[0], inputs.bounds.shape[0] - 1
    advantage, returns = new_rows(2, num_tokens, inputs.reward)
    if num_responses:
        bootstrap_value = contiguous(inputs.bootstrap_value)
        gae_kernel[(num_responses,)](
            inputs.reward.contiguous(),
            inputs.value.contiguous(),
            inputs.bounds.contiguous(),
            advantage if bootstrap_value is None else bootstrap_value,  # an unused pointer
            advantage,
            returns,
            *_halves(inputs.gamma),
            *_halves(inputs.gamma * inputs.gae_lambda),
            HAS_BOOTSTRAP_VALUE=bootstrap_value is not None,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(max(num_tokens, 1))),
            num_warps=4,
        )
    return advantage, returns
