"""One tile of a language-model head: project hidden rows, read the logits once, leave the gradient.

Shared, unchanged, by `linear_logprob` and `fused_linear_loss`. A tile is C rows of logits in the
accumulation dtype (float32; float64 for float64 inputs). One pass over it, strip by strip so that a
strip stays in the cache, gives each row's statistics and overwrites the row with its *bracket*,

    bracket_v = d logprob / d product_v = (1[v = y] - p_v) * dz_v / dproduct_v,

which does not depend on the loss: whatever coefficient g a loss later gives to the row's log-prob,
the gradients are g * (bracket @ W) and bracket^T @ (g * hidden). So no pass over the tile follows.

Legend: C tile rows, V vocabulary, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TILE_ROWS = 2048
DEFAULT_BUFFER_ROWS = 4096
MIN_DEFAULT_BUFFER_BYTES = 256 * 2**20
# A strip and its two scratch copies should stay in a CPU core's cache; a GPU wants few launches.
STRIP_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}
# Stands for -inf where 0 * -inf would be NaN: exp of it is exactly 0 in every dtype used here.
LOWEST_SHIFTED_LOGIT = -1e30


@dataclass(frozen=True)
class HeadTransform:
    """From products to logits: z = softcap(logit_scale * (hidden @ W^T + bias)) / temperature.

    softcap(x) = c * tanh(x / c), as in Gemma 2 (arXiv 2408.00118, section 2); `logit_scale` is
    Cohere's multiplier, or one over Granite's divisor. `temperature` is None (1.0), or a tensor
    of one element or of one per row.
    """

    temperature: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, start: int, stop: int) -> "HeadTransform":
        """The same transform for rows start..stop."""
        if self.temperature is None or self.temperature.numel() == 1:
            return self
        return HeadTransform(self.temperature[start:stop], self.softcap, self.logit_scale)

    def gain(self, like: Tensor) -> Tensor | float:
        """The factor from u (the tanh, or the raw product) to z: a float, or (C, 1)."""
        factor = self.logit_scale if self.softcap is None else self.softcap
        return self._over_temperature(factor, like)

    def slope(self, like: Tensor) -> Tensor | float:
        """The derivative of z by the product, less the tanh's own: a float, or (C, 1)."""
        return self._over_temperature(self.logit_scale, like)

    def _over_temperature(self, factor: float, like: Tensor) -> Tensor | float:
        if self.temperature is None:
            return factor
        return (factor / self.temperature.to(like.dtype)).reshape(-1, 1)


@dataclass(frozen=True)
class RowStatistics:
    """What one pass over the logits tells about each row, all (C,); the floats as accumulated.

    Ignored rows hold logprob 0, entropy 0, is_argmax False.
    """

    logprob: Tensor
    entropy: Tensor
    is_argmax: Tensor


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and the weight's gradient: float32; float64 for float64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def product_dtype(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of the products' operands, already rounded to `compute_dtype`.

    bfloat16 stays bfloat16 where a product can accumulate and *return* float32 (CUDA): rounding
    logits to bfloat16 would cost about 0.45 nat per 512-token sequence. Elsewhere the rounded
    operands are promoted. float16 is always promoted: a loss's coefficients underflow in it.
    """
    if compute_dtype in (torch.float32, torch.float64):
        return compute_dtype
    return (
        torch.bfloat16
        if (compute_dtype, device_type) == (torch.bfloat16, "cuda")
        else torch.float32
    )


def operand(value: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """`value` rounded to `compute_dtype`, in the dtype its products take on this device."""
    return value.to(compute_dtype).to(product_dtype(compute_dtype, value.device.type))


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left @ right into `out`, accumulated and returned in `out`'s dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Adds left @ right to `out`, accumulated in `out`'s dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes hidden (C, D) @ weight (V, D)^T + bias (V,) into out (C, V)."""
    product(hidden, weight.t(), out)
    if bias is not None:
        out.add_(bias)


def strip_rows(num_columns: int, num_rows: int, device_type: str) -> int:
    """How many rows one strip of a tile has: at most an eighth of the tile, to save memory."""
    fitting = STRIP_ELEMENTS.get(device_type, STRIP_ELEMENTS["cuda"]) // max(num_columns, 1)
    return max(1, min(fitting, num_rows // 8))


def read_tile(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    *,
    bracket: Tensor | None,
    with_entropy: bool,
) -> RowStatistics:
    """Reads the statistics of tile (C, V), destroying it; the brackets go into `bracket` if given.

    Args:
        tile: Products plus bias, in the accumulation dtype.
        targets: (C,) int64, in range even where ignored.
        ignored: (C,) bool.
        transform: What turns the products into logits.
        scratch: (2, S, V) of the tile's dtype; S rows are worked on at a time.
        bracket: (C, V), of any float dtype; may be `tile` itself.
        with_entropy: Whether to compute entropies; zeros otherwise.
    """
    parts = []
    for start in range(0, tile.shape[0], scratch.shape[1]):
        stop = min(start + scratch.shape[1], tile.shape[0])
        parts.append(
            _read_strip(
                tile[start:stop],
                targets[start:stop, None],
                ignored[start:stop, None],
                transform.rows(start, stop),
                scratch[:, : stop - start],
                None if bracket is None else bracket[start:stop],
                with_entropy,
            )
        )
    if not parts:
        empty = tile.new_zeros(0)
        return RowStatistics(empty, empty, empty.bool())
    return RowStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _shifted_logits(u: Tensor, transform: HeadTransform, out: Tensor) -> None:
    """Turns the strip u into the tanh, when there is a softcap, and out into z - max z."""
    if transform.softcap is not None:
        u.mul_(transform.logit_scale / transform.softcap).tanh_()
    torch.sub(u, u.amax(dim=1, keepdim=True), out=out)
    gain = transform.gain(u)
    if not (isinstance(gain, float) and gain == 1.0):
        out.mul_(gain)


def _read_strip(
    u: Tensor,
    target: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    bracket: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shifted, exponential = scratch[0], scratch[1]
    _shifted_logits(u, transform, out=shifted)
    target_logit = shifted.gather(1, target)
    torch.exp(shifted, out=exponential)
    total = exponential.sum(dim=1, keepdim=True)
    log_sum = total.log()
    logprob = target_logit - log_sum
    entropy = torch.zeros_like(log_sum)
    if with_entropy:
        shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
        entropy = log_sum - shifted.sum(dim=1, keepdim=True) / total
    if bracket is not None:
        slope = transform.slope(u)
        exponential.mul_((-slope / total).masked_fill_(ignored, 0.0))
        # 1 - p from the log-prob: exact where p is near 1
        at_target = (-torch.expm1(logprob) * slope).masked_fill_(ignored, 0.0)
        exponential.scatter_(1, target, at_target)
        if transform.softcap is not None:
            exponential.mul_(u.square_().neg_().add_(1.0))
        bracket.copy_(exponential)
    return (
        logprob.masked_fill_(ignored, 0.0).squeeze(1),
        # rounding may leave a sure row a hair below zero
        entropy.clamp_(min=0.0).masked_fill_(ignored, 0.0).squeeze(1),
        (target_logit.ge(0.0) & ~ignored).squeeze(1),
    )


def overwrite_with_gradient(
    tile: Tensor,
    targets: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    out: Tensor,
) -> None:
    """Writes into out (C, V) the products' gradient for both outputs' gradients, each (C,).

    d entropy / d z_v = -p_v (log p_v + entropy). Rows whose two gradients are zero get zeros, so an
    ignored row needs no mask of its own. `tile` is destroyed and may be `out`.
    """
    for start in range(0, tile.shape[0], scratch.shape[1]):
        stop = min(start + scratch.shape[1], tile.shape[0])
        u, rows = tile[start:stop], transform.rows(start, stop)
        log_p, p = scratch[0, : stop - start], scratch[1, : stop - start]
        g, e = grad_logprob[start:stop, None], grad_entropy[start:stop, None]
        _shifted_logits(u, rows, out=log_p)
        torch.exp(log_p, out=p)
        log_p.sub_(p.sum(dim=1, keepdim=True).log()).clamp_(min=LOWEST_SHIFTED_LOGIT)
        # in place, then p once more: a product of its own would be a strip beyond the budget
        entropy = -torch.exp(log_p, out=p).mul_(log_p).sum(dim=1, keepdim=True)
        torch.exp(log_p, out=p)
        p.mul_(log_p.add_(entropy).mul_(e).add_(g)).neg_()
        p.scatter_add_(1, targets[start:stop, None], g.to(p.dtype))
        p.mul_(rows.slope(u))
        if rows.softcap is not None:
            p.mul_(u.square_().neg_().add_(1.0))
        out[start:stop].copy_(p)
