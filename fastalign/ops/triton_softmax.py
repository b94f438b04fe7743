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
def u_of(x, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Return the tanh of a softcap, or the product itself."""
    if HAS_SOFTCAP:
        x = tanh(x * cap_scale)
    return x


@triton.jit
def load_columns(row_ptr, start, num_columns, other, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of a row as float32, and which of its columns lie inside the row.

    A WHOLE block is loaded without a mask: of a number of columns that is not a multiple of 16
    Triton would make scalar loads.
    """
    column = start + tl.arange(0, BLOCK)
    inside = column < num_columns
    pointers = row_ptr + column
    x = tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=other)
    return x.to(tl.float32), inside


@triton.jit
def store_columns(row_ptr, start, num_columns, values, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block of a row, rounded to its dtype; a WHOLE one without a mask."""
    column = start + tl.arange(0, BLOCK)
    values = values.to(row_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(row_ptr + column, values)
    else:
        tl.store(row_ptr + column, values, mask=column < num_columns)


@triton.jit
def _add_columns(
    x_ptr,
    start,
    num_columns,
    m,
    total,
    weighted,
    cap_scale,
    gain,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one block of a row to its sums."""
    x, inside = load_columns(x_ptr, start, num_columns, -float("inf"), WHOLE, BLOCK)
    u = u_of(x, cap_scale, HAS_SOFTCAP)
    if not WHOLE:
        u = tl.where(inside, u, -float("inf"))
    return add_block(m, total, weighted, u, gain)


@triton.jit
def row_sums(
    x_ptr,
    num_columns,
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
    whole = num_columns // BLOCK * BLOCK  # a product: Triton 3.6 sees what divides it
    for start in range(0, whole, BLOCK):
        m, total, weighted = _add_columns(
            x_ptr, start, num_columns, m, total, weighted, cap_scale, gain, HAS_SOFTCAP, True, BLOCK
        )
    for start in range(whole, num_columns, BLOCK):  # once, or not at all
        m, total, weighted = _add_columns(
            x_ptr,
            start,
            num_columns,
            m,
            total,
            weighted,
            cap_scale,
            gain,
            HAS_SOFTCAP,
            False,
            BLOCK,
        )
    return m, total, weighted


@triton.jit
def one_less_p(logprob):
    """Return 1 - p, by its series where p is near 1: 1 - exp(logprob) would cancel there."""
    series = 1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666667))
    return tl.where(logprob > -0.01, -logprob * series, 1.0 - tl.exp(logprob))


@triton.jit
def _write_columns(
    x_ptr,
    gradient_ptr,
    start,
    num_columns,
    target,
    is_target,
    transform,
    known,
    upstream,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of a row's gradient."""
    cap_scale, gain, slope = transform
    m, log_total, logprob, entropy = known
    g, e = upstream
    x, inside = load_columns(x_ptr, start, num_columns, 0.0, WHOLE, BLOCK)
    u = u_of(x, cap_scale, HAS_SOFTCAP)
    log_p = (u - m) * gain - log_total
    if not WHOLE:
        # outside, a maximum far below zero would make the exponential overflow
        log_p = tl.where(inside, log_p, -float("inf"))
    p = tl.exp(log_p)
    column = start + tl.arange(0, BLOCK)
    result = g * tl.where(column == target, one_less_p(logprob), -p)
    if HAS_GRAD_ENTROPY:
        result -= e * p * (tl.where(log_p < -1e30, -1e30, log_p) + entropy)
    if HAS_SOFTCAP:
        result *= 1.0 - u * u
    result = tl.where(is_target, result * slope, 0.0)
    store_columns(gradient_ptr, start, num_columns, result, WHOLE, BLOCK)


@triton.jit
def write_gradient(
    x_ptr,
    gradient_ptr,
    num_columns,
    target,
    is_target,
    transform,
    known,
    upstream,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's slope [g (1[v = y] - p) - e p (log p + H)] over its columns.

    `transform` and `known` are tuples; known[0] is the maximum of u.
    """
    tl.debug_barrier()  # every thread has read the target before any overwrites it
    whole = num_columns // BLOCK * BLOCK  # a product: Triton 3.6 sees what divides it
    for start in range(0, whole, BLOCK):
        _write_columns(
            x_ptr,
            gradient_ptr,
            start,
            num_columns,
            target,
            is_target,
            transform,
            known,
            upstream,
            HAS_SOFTCAP,
            HAS_GRAD_ENTROPY,
            True,
            BLOCK,
        )
    for start in range(whole, num_columns, BLOCK):  # once, or not at all
        _write_columns(
            x_ptr,
            gradient_ptr,
            start,
            num_columns,
            target,
            is_target,
            transform,
            known,
            upstream,
            HAS_SOFTCAP,
            HAS_GRAD_ENTROPY,
            False,
            BLOCK,
        )


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
def bounded(shifted):
    """Bound a banned token's logit from below, for 0 * -inf is NaN; a NaN stays one."""
    return tl.where(shifted < -1e30, -1e30, shifted)


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
    num_columns,
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
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(policy_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(reference_ptr + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.where(inside, u_of(x, cap_scale, HAS_SOFTCAP), lowest)
        v = tl.where(inside, u_of(y, cap_scale, HAS_SOFTCAP), lowest)
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
