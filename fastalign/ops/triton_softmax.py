"""What the Triton kernels share: tanh, and the running statistics of a softmax."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Tanh, which tl has for GPUs only."""
    # From the side where the exponential cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def add_block(m, total, weighted, z, scale=1.0):
    """The maximum m, the sums of exp(z - m) and of (z - m) exp(z - m), with one more block z.

    With a scale, the sums are those of scale * z.
    """
    new_m = tl.maximum(m, tl.max(z, axis=0))
    # -inf - -inf is NaN, and so is 0 * -inf; a NaN of the logits stays one.
    subtracted = tl.where(new_m == -float("inf"), 0.0, new_m)
    # Before anything finite was seen there is nothing to rescale.
    drop = tl.where(m == -float("inf"), 0.0, (m - subtracted) * scale)
    shrink = tl.exp(drop)
    shifted = (z - subtracted) * scale
    shifted = tl.where(shifted < -1e30, -1e30, shifted)
    e = tl.exp(shifted)
    weighted = shrink * (weighted + drop * total) + tl.sum(e * shifted, axis=0)
    total = shrink * total + tl.sum(e, axis=0)
    return new_m, total, weighted
