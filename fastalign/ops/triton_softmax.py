"""Parts of the Triton kernels: the logit transform, softmaxes' statistics, and a row's gradient.

Arithmetic is float32, whatever the dtype of the logits.
"""

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
def bounded(shifted):
    """Bound a banned token's logit from below, for 0 * -inf is NaN; a NaN stays one."""
    return tl.where(shifted < -1e30, -1e30, shifted)


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
    shifted = bounded((z - subtracted) * scale)
    e = tl.exp(shifted)
    weighted = shrink * (weighted + drop * total) + tl.sum(e * shifted, axis=0)
    total = shrink * total + tl.sum(e, axis=0)
    return new_m, total, weighted


@triton.jit
def u_of(x, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Return the tanh of a softcap, or the product itself."""
    if HAS_SOFTCAP:
        x = tanh(x * cap_scale)
    return x


@triton.jit
def load_columns(row_ptr, column, columns):
    """Return columns of a row as float32; zeros outside of the row.

    `columns` is a tuple, here and below: their number, and that with the padding.

    The mask is of the padded row (`backends.padded_width`): for a number of columns that is not a
    multiple of 16, Triton would make scalar loads.
    """
    num_columns, num_padded = columns
    x = tl.load(row_ptr + column, mask=column < num_padded, other=0.0)
    return tl.where(column < num_columns, x.to(tl.float32), 0.0)


@triton.jit
def load_u(row_ptr, column, columns, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Return u of columns of a row; -inf outside of the row."""
    x = load_columns(row_ptr, column, columns)
    return tl.where(column < columns[0], u_of(x, cap_scale, HAS_SOFTCAP), -float("inf"))


@triton.jit
def store_columns(row_ptr, column, num_padded, values):
    """Store columns of a row and of its padding, rounded to its dtype."""
    values = values.to(row_ptr.dtype.element_ty)
    tl.store(row_ptr + column, values, mask=column < num_padded)


@triton.jit
def row_sums(
    x_ptr,
    columns,
    cap_scale,
    gain,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the maximum of u, and of z less its maximum the sums of exp(z) and of z exp(z).

    The maximum is that of u, so that a target's u less it is exactly 0 where it is the maximum.
    """
    m = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, columns[0], BLOCK):
        column = start + tl.arange(0, BLOCK)
        u = load_u(x_ptr, column, columns, cap_scale, HAS_SOFTCAP)
        m, total, weighted = add_block(m, total, weighted, u, gain)
    return m, total, weighted


@triton.jit
def one_less_p(logprob):
    """Return 1 - p, by its series where p is near 1: 1 - exp(logprob) would cancel there."""
    series = 1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666667))
    return tl.where(logprob > -0.01, -logprob * series, 1.0 - tl.exp(logprob))


@triton.jit
def write_gradient(
    x_ptr,
    gradient_ptr,
    columns,
    target,
    is_target,
    transform,
    known,
    upstream,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's slope [g (1[v = y] - p) - e p (log p + H)] over its columns and padding.

    `transform` and `known` are tuples; known[0] is the maximum of u.
    """
    cap_scale, gain, slope = transform
    m, log_total, logprob, entropy = known
    g, e = upstream
    tl.debug_barrier()  # every thread has read the target before any overwrites it
    for start in range(0, columns[0], BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_columns(x_ptr, column, columns)
        u = u_of(x, cap_scale, HAS_SOFTCAP)
        # outside, a maximum far below zero would make the exponential overflow
        log_p = tl.where(column < columns[0], (u - m) * gain - log_total, -float("inf"))
        p = tl.exp(log_p)
        result = g * tl.where(column == target, one_less_p(logprob), -p)
        if HAS_GRAD_ENTROPY:
            result -= e * p * (bounded(log_p) + entropy)
        if HAS_SOFTCAP:
            result *= 1.0 - u * u
        result = tl.where(is_target, result * slope, 0.0)
        store_columns(gradient_ptr, column, columns[1], result)


@triton.jit
def row_transform(
    row,
    temperature_ptr,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return cap_scale, gain and slope: u = tanh(cap_scale x) or x, z = gain u, dz / dx by u.

    A row's maximum is subtracted from u: the rounding error of a product with a large z could
    exceed differences of z.
    """
    slope, cap_scale = logit_scale, logit_scale / softcap
    if HAS_TEMPERATURE:
        slope = slope / tl.load(temperature_ptr + row)
    gain = slope
    if HAS_SOFTCAP:
        gain = slope / cap_scale
    return cap_scale, gain, slope


@triton.jit
def _less(z, m, scale):
    # Until a finite value comes m is -inf, and -inf - -inf is NaN.
    return bounded((z - tl.where(m == -float("inf"), 0.0, m)) * scale)


@triton.jit
def _drop(m, new_m, scale):
    return tl.where(m == -float("inf"), 0.0, _less(m, new_m, scale))


@triton.jit
def add_pair(
    m, total, weighted, n, reference_total, cross, largest, z, r, scale, OVER: tl.constexpr
):
    """Add a block, z and r, to the running statistics of a policy and a reference.

    m, total and weighted are the policy's as in `add_block`; n and reference_total the
    reference's maximum and sum. With d = scale * ((z - m) - (r - n)), cross is the sum of
    exp(scale * (z - m)) d and largest the largest d; with OVER (the reference) d has the other
    sign, and its weight is the reference's exponential.
    """
    new_m, new_n = tl.maximum(m, tl.max(z, axis=0)), tl.maximum(n, tl.max(r, axis=0))
    drop, reference_drop = _drop(m, new_m, scale), _drop(n, new_n, scale)
    shrink, reference_shrink = tl.exp(drop), tl.exp(reference_drop)
    s, t = _less(z, new_m, scale), _less(r, new_n, scale)
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
def pair_sums(
    policy_ptr,
    reference_ptr,
    columns,
    cap_scale,
    gain,
    OVER_REFERENCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the running statistics of `add_pair` over whole rows; the maxima are those of u."""
    lowest = -float("inf")
    m, total, weighted = lowest, 0.0, 0.0
    n, reference_total, cross, largest = lowest, 0.0, 0.0, lowest
    for start in range(0, columns[0], BLOCK):
        column = start + tl.arange(0, BLOCK)
        u = load_u(policy_ptr, column, columns, cap_scale, HAS_SOFTCAP)
        v = load_u(reference_ptr, column, columns, cap_scale, HAS_SOFTCAP)
        m, total, weighted, n, reference_total, cross, largest = add_pair(
            m, total, weighted, n, reference_total, cross, largest, u, v, gain, OVER_REFERENCE
        )
    return m, total, weighted, n, reference_total, cross, largest


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
