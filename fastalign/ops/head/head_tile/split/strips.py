"""The split passes over a tile in PyTorch, strip by strip; float64 for a float64 tile.

Legend: C tile rows, S strip rows, V the columns here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.strips import LOWEST_SHIFTED_LOGIT, StripSoftmax, write_gradient
from fastalign.ops.head.head_tile.transform import HeadTransform, SoftmaxStatistics, TileStatistics


def _strips(num_rows: int, scratch: Tensor) -> Iterator[slice]:
    for start in range(0, num_rows, scratch.shape[1]):
        yield slice(start, min(start + scratch.shape[1], num_rows))


def _capped(tile: Tensor, transform: HeadTransform, out: Tensor) -> Tensor:
    """The tile's u: its tanh, in `out`, or where there is no softcap the tile itself."""
    if transform.softcap is None:
        return tile
    return torch.mul(tile, transform.logit_scale / transform.softcap, out=out).tanh_()


def _shifted(u: Tensor, maximum: Tensor, transform: HeadTransform, out: Tensor) -> None:
    """Writes gain * (u - maximum) into `out`."""
    torch.sub(u, maximum, out=out).mul_(transform.gain(u))


def statistics(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    with_entropy: bool,
) -> TileStatistics:
    """See `head_tile_statistics`."""
    num_rows, num_columns = tile.shape
    found = TileStatistics.empty(num_rows, tile.device, with_entropy, tile.dtype)
    has_target = (targets >= 0) & (targets < num_columns)
    columns = targets.clamp(0, num_columns - 1)[:, None]
    for rows in _strips(num_rows, scratch):
        shifted, exponential = scratch[:, : rows.stop - rows.start]
        row_transform = transform.rows(rows.start, rows.stop)
        u = _capped(tile[rows], row_transform, out=exponential)
        maximum = u.amax(dim=1, keepdim=True)
        found.maximum[rows] = maximum[:, 0]
        found.target[rows] = u.gather(1, columns[rows])[:, 0]
        _shifted(u, maximum.masked_fill(maximum == -torch.inf, 0.0), row_transform, out=shifted)
        torch.exp(shifted, out=exponential)
        found.total[rows] = exponential.sum(dim=1)
        if found.weighted is not None:
            weighted = shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
            found.weighted[rows] = weighted.sum(dim=1)
    found.target.masked_fill_(~has_target, 0.0)
    for value in (found.maximum, found.total, found.weighted, found.target):
        if value is not None:
            value.masked_fill_(ignored, 0.0)
    return found


def gradient(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    known: SoftmaxStatistics,
    scratch: Tensor,
    gradient: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """See `head_tile_gradient`."""
    num_rows, num_columns = tile.shape
    has_target = ((targets >= 0) & (targets < num_columns))[:, None]
    columns = targets.clamp(0, num_columns - 1)[:, None]
    for rows in _strips(num_rows, scratch):
        u, strip = tile[rows], scratch[:, : rows.stop - rows.start]
        shifted, exponential = strip
        row_transform = transform.rows(rows.start, rows.stop)
        u = _capped(u, row_transform, out=u)
        _shifted(u, known.maximum[rows, None], row_transform, out=shifted)
        torch.exp(shifted, out=exponential)
        log_total = known.log_total[rows, None]
        logprob = shifted.gather(1, columns[rows]) - log_total
        if grad_entropy is not None:
            shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
        softmax = StripSoftmax(log_total.exp(), log_total, logprob, known.entropy[rows, None])
        write_gradient(
            u,
            columns[rows],
            ignored[rows, None],
            row_transform,
            strip,
            softmax,
            gradient[rows],
            None if grad_logprob is None else grad_logprob[rows, None],
            None if grad_entropy is None else grad_entropy[rows, None],
            has_target[rows],
        )
