"""The passes over a tile in PyTorch, strip by strip so that a strip stays in the cache.

Float64 for a float64 tile.

Legend: C tile rows, S strip rows, V the columns here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.tile import (
    HeadTransform,
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
)
from fastalign.ops.target_columns import target_columns

# A strip and its two scratch copies should stay in a CPU core's cache; a GPU wants few launches.
STRIP_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}
# Replaces -inf where 0 * -inf would be NaN: exp of it is exactly 0 in every dtype used here.
LOWEST_SHIFTED_LOGIT = -1e30


def strip_rows(num_columns: int, num_rows: int, device_type: str) -> int:
    """Return the rows of one strip of a tile: at most an eighth of the tile, to save memory."""
    fitting = STRIP_ELEMENTS.get(device_type, STRIP_ELEMENTS["cuda"]) // max(num_columns, 1)
    return max(1, min(fitting, num_rows // 8))


def strips(num_rows: int, scratch: Tensor) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each strip."""
    for start in range(0, num_rows, scratch.shape[1]):
        yield start, min(start + scratch.shape[1], num_rows)


def read(tile: Tile, scratch: Tensor, gradient: Tensor | None, upstream: Upstream) -> RowStatistics:
    """See `head_tile.read_tile`."""
    parts = []
    for start, stop in strips(tile.products.shape[0], scratch):
        destination = None if gradient is None else gradient[start:stop]
        by_row, strip = upstream.columns(start, stop), scratch[:, : stop - start]
        parts.append(_read_strip(tile.rows(start, stop), strip, destination, by_row))
    return RowStatistics.joined(parts, tile.products)


def shifted_logits(u: Tensor, transform: HeadTransform, out: Tensor) -> None:
    """Turn the strip u into the tanh, where there is a softcap, and `out` into z - max z."""
    if transform.softcap is not None:
        u.mul_(transform.logit_scale / transform.softcap).tanh_()
    torch.sub(u, u.amax(dim=1, keepdim=True), out=out)
    gain = transform.gain(u)
    if not (isinstance(gain, float) and gain == 1.0):
        out.mul_(gain)


def _read_strip(
    tile: Tile, scratch: Tensor, gradient: Tensor | None, upstream: Upstream
) -> RowStatistics:
    """Read one strip; `upstream` holds columns (S, 1)."""
    shifted, exponential = scratch[0], scratch[1]
    ignored, num_columns = tile.ignored[:, None], tile.products.shape[1]
    target, factor = target_columns(tile.targets, tile.ignored, num_columns, shifted.dtype)
    shifted_logits(tile.products, tile.transform, out=shifted)
    target_logit = shifted.gather(1, target) * factor
    torch.exp(shifted, out=exponential)
    total = exponential.sum(dim=1, keepdim=True)
    log_sum = total.log()
    logprob = target_logit - log_sum
    shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
    entropy = log_sum - shifted.sum(dim=1, keepdim=True) / total
    if gradient is not None:
        # a total that is NaN makes the whole row NaN
        softmax = StripSoftmax(total * factor, log_sum, logprob, entropy)
        tile = replace(tile, targets=target.squeeze(1))
        _write_gradient(tile, scratch, softmax, gradient, upstream)
    return RowStatistics(
        logprob.masked_fill_(ignored, 0.0).squeeze(1),
        # rounding may leave a sure row a hair below zero
        entropy.clamp_(min=0.0).masked_fill_(ignored, 0.0).squeeze(1),
        (target_logit.ge(0.0) & ~ignored).squeeze(1),
    )


@dataclass(frozen=True)
class StripSoftmax:
    """The softmax of a strip's rows, all (S, 1); `total` belongs to the exponentials in scratch."""

    total: Tensor
    log_total: Tensor
    logprob: Tensor
    entropy: Tensor


def _write_gradient(
    tile: Tile,
    scratch: Tensor,
    softmax: StripSoftmax,
    gradient: Tensor,
    upstream: Upstream,
    has_target: Tensor | None = None,
) -> None:
    """Write a strip's gradient, and destroy its products, which with a softcap are the tanh.

    scratch[1] holds e = exp(z - maximum); scratch[0] holds e (z - maximum), where an entropy's
    gradient asks for it. `has_target` (S, 1): True where the target is among these columns.
    """
    u, target = tile.products, tile.targets[:, None]
    weighted, exponential = scratch[0], scratch[1]
    slope = tile.transform.slope(u)
    g = slope if upstream.logprob is None else slope * upstream.logprob.to(u.dtype)
    # 1 - p from the log-prob: exact where p is near 1
    at_target = -torch.expm1(softmax.logprob) * g
    if upstream.entropy is None:
        exponential.mul_(-g / softmax.total)
    else:
        # d entropy / d z_v = -p_v (log p_v + entropy), and e_v log p_v is in `weighted`
        e = slope * upstream.entropy.to(u.dtype)
        rest = e * (softmax.entropy - softmax.log_total) + g
        log_p = softmax.logprob.clamp(min=LOWEST_SHIFTED_LOGIT)
        at_target -= e * softmax.logprob.exp() * (log_p + softmax.entropy)
        exponential.mul_(-rest / softmax.total)
        exponential.sub_(weighted.mul_(e / softmax.total))
    if has_target is not None:
        at_target = torch.where(has_target, at_target, exponential.gather(1, target))
    exponential.scatter_(1, target, at_target)
    if tile.transform.softcap is not None:
        exponential.mul_(u.square_().neg_().add_(1.0))
    gradient.copy_(exponential.masked_fill_(tile.ignored[:, None], 0.0))


def _capped(u: Tensor, transform: HeadTransform, out: Tensor) -> Tensor:
    """Return the products' tanh, in `out`, or where there is no softcap the products."""
    if transform.softcap is None:
        return u
    return torch.mul(u, transform.logit_scale / transform.softcap, out=out).tanh_()


def _write_shifted(u: Tensor, maximum: Tensor, transform: HeadTransform, out: Tensor) -> None:
    """Write gain * (u - maximum) into `out`."""
    torch.sub(u, maximum, out=out).mul_(transform.gain(u))


def _own_targets(tile: Tile) -> tuple[Tile, Tensor]:
    """Return the tile with targets moved into its columns, and where (C,) they are its own."""
    num_columns = tile.products.shape[1]
    has_target = (tile.targets >= 0) & (tile.targets < num_columns)
    targets = tile.targets.clamp(0, num_columns - 1)
    return Tile(tile.products, targets, tile.ignored, tile.transform), has_target


def statistics(tile: Tile, scratch: Tensor, with_entropy: bool) -> TileStatistics:
    """See `head_tile.head_tile_statistics`."""
    num_rows, like = tile.products.shape[0], tile.products
    found = TileStatistics.empty(num_rows, like.device, with_entropy, like.dtype)
    tile, has_target = _own_targets(tile)
    for start, stop in strips(num_rows, scratch):
        rows, strip = slice(start, stop), tile.rows(start, stop)
        shifted, exponential = scratch[:, : stop - start]
        # the products have to stay, so the tanh lies in scratch until its exponential is taken
        u = _capped(strip.products, strip.transform, out=exponential)
        maximum = u.amax(dim=1, keepdim=True)
        found.maximum[rows] = maximum[:, 0]
        found.target[rows] = u.gather(1, strip.targets[:, None])[:, 0]
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        _write_shifted(u, finite, strip.transform, out=shifted)
        torch.exp(shifted, out=exponential)
        found.total[rows] = exponential.sum(dim=1)
        if found.weighted is not None:
            weighted = shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
            found.weighted[rows] = weighted.sum(dim=1)
    found.target.masked_fill_(~has_target, 0.0)
    for value in (found.maximum, found.total, found.weighted, found.target):
        if value is not None:
            value.masked_fill_(tile.ignored, 0.0)
    return found


def gradient(
    tile: Tile,
    known: SoftmaxStatistics,
    scratch: Tensor,
    gradient: Tensor,
    upstream: Upstream,
) -> None:
    """See `head_tile.head_tile_gradient`."""
    tile, has_target = _own_targets(tile)
    for start, stop in strips(tile.products.shape[0], scratch):
        part, strip = tile.rows(start, stop), scratch[:, : stop - start]
        shifted, exponential = strip
        u = _capped(part.products, part.transform, out=part.products)
        maximum, log_total, entropy = (values[start:stop, None] for values in known)
        _write_shifted(u, maximum, part.transform, out=shifted)
        torch.exp(shifted, out=exponential)
        logprob = shifted.gather(1, part.targets[:, None]) - log_total
        if upstream.entropy is not None:
            shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
        softmax = StripSoftmax(log_total.exp(), log_total, logprob, entropy)
        by_row, own = upstream.columns(start, stop), has_target[start:stop, None]
        _write_gradient(part, strip, softmax, gradient[start:stop], by_row, own)
