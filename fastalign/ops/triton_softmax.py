"""Parts of the Triton kernels: tanh, the logit transform, and a softmax's running statistics."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Compute tanh, which tl has for GPUs only."""
    # From the side where the exponential cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def transform(x, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """Return z = softcap * tanh(x / softcap) * scale, where scale is 1 / temperature."""
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x * scale


@triton.jit
def add_block(m, total, weighted, z, scale=1.0):
    """Add a block z to the maximum m and the sums of exp(z - m) and of (z - m) exp(z - m).

    With a scale, the sums are those of scale * z.
    """
    new_m = tl.maximum(m, tl.max(z, axis=0))
    # -inf - -inf is NaN, and so is 0 * -inf; a NaN of the logits stays one.
    subtracted = tl.where(new_m == -float("inf"), 0.0, new_m)
    # Until a finite value comes total is 0, and drop * total would be -inf * 0.
    drop = tl.where(m == -float("inf"), 0.0, (m - subtracted) * scale)
    shrink = tl.exp(drop)
    shifted = (z - subtracted) * scale
    shifted = tl.where(shifted < -1e30, -1e30, shifted)
    e = tl.exp(shifted)
    weighted = shrink * (weighted + drop * total) + tl.sum(e * shifted, axis=0)
    total = shrink * total + tl.sum(e, axis=0)
    return new_m, total, weighted


@triton.jit
def bounded(shifted):
    """Bound a banned token's logit from below, for 0 * -inf is NaN; a NaN stays one."""
    return tl.where(shifted < -1e30, -1e30, shifted)


@triton.jit
def _less(z, m):
    # Until a finite value comes m is -inf, and -inf - -inf is NaN.
    return bounded(z - tl.where(m == -float("inf"), 0.0, m))


@triton.jit
def _drop(m, new_m):
    return tl.where(m == -float("inf"), 0.0, bounded(m - tl.where(m == -float("inf"), 0.0, new_m)))


@triton.jit
def add_pair(m, total, weighted, n, reference_total, cross, largest, z, r, OVER: tl.constexpr):
    """Add a block, z and r, to the running statistics of a policy and a reference.

    m, total and weighted are the policy's as in `add_block`; n and reference_total the
    reference's maximum and sum. With d = (z - m) - (r - n), cross is the sum of exp(z - m) d and
    largest the largest d; with OVER (the reference) d has the other sign, and its weight is
    exp(r - n).
    """
    new_m, new_n = tl.maximum(m, tl.max(z, axis=0)), tl.maximum(n, tl.max(r, axis=0))
    drop, reference_drop = _drop(m, new_m), _drop(n, new_n)
    shrink, reference_shrink = tl.exp(drop), tl.exp(reference_drop)
    s, t = _less(z, new_m), _less(r, new_n)
    e, f = tl.exp(s), tl.exp(t)
    # New maxima change d of all columns so far by the same amount, so the sums can be corrected.
    change = drop - reference_drop
    d = s - t
    if OVER:
        change, d = -change, -d
        cross = reference_shrink * (cross + change * reference_total) + tl.sum(f * d, axis=0)
    else:
        cross = shrink * (cross + change * total) + tl.sum(e * d, axis=0)
    weighted = shrink * (weighted + drop * total) + tl.sum(e * s, axis=0)
    total = shrink * total + tl.sum(e, axis=0)
    reference_total = reference_shrink * reference_total + tl.sum(f, axis=0)
    largest = tl.maximum(largest + change, tl.max(d, axis=0))
    return new_m, total, weighted, new_n, reference_total, cross, largest


@triton.jit
def divergence(total, reference_total, cross, largest, OVER: tl.constexpr):
    """Return the mean of d, and the KL, from the sums of `add_pair`."""
    if OVER:
        mean = cross / reference_total
        kl = mean - tl.log(reference_total / total)
    else:
        mean = cross / total
        kl = mean - tl.log(total / reference_total)
    # Rounding may leave the KL slightly below zero. A d above 5e29 comes from a banned token.
    kl = tl.where(kl < 0.0, 0.0, kl)
    return mean, tl.where(largest > 5e29, float("inf"), kl)
