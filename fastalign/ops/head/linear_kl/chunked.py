"""Two heads in tiles: statistics forward, products backward, with a bounded number of logits.

Legend: N rows, V vocabulary, D and E hidden, K kept rows. Products, in units of N * D * V FLOPs
where D = E: forward 4, and 4 more for rows of a frozen head that are not kept; backward 4 (2 for a
frozen head) for kept rows, 8 for the others (0 for a frozen head's).
"""

import torch
from torch import Tensor

from fastalign.ops.head.kl_tile import PairStatistics, Upstream
from fastalign.ops.head.linear_kl.buffers import PairBuffers
from fastalign.ops.head.linear_kl.operands import HeadPair
from fastalign.ops.head.linear_logprob.chunked import add_products, scaled_rows, tile_spans
from fastalign.ops.head.linear_logprob.operands import Gradients
from fastalign.ops.head.products import accumulation_dtype, product


def forward(
    pair: HeadPair, buffers: PairBuffers, *, kept: Tensor, projected: Tensor | None = None
) -> PairStatistics:
    """Reads every row's statistics; keeps what the backward wants in the places given.

    Args:
        pair: The operands, N rows.
        buffers: Scratch memory.
        kept: (2, K, V) in the products' dtype: receives both brackets of the first K rows.
        projected: (2, N - K, D) in the accumulation dtype: receives both brackets @ W of the rest.
    """
    num_rows, num_kept = pair.policy.hidden.shape[0], kept.shape[1]
    parts = []
    for start, stop in tile_spans(num_rows, num_kept, buffers.tile_rows):
        rows, place = pair.rows(start, stop), None
        if start < num_kept:
            place = kept[:, start:stop]
        elif projected is not None:
            place = buffers.converted(stop - start)
        in_place = start < num_kept and buffers.projects_in_place
        tiles = place if in_place and place is not None else buffers.tiles(stop - start)
        rows.project(tiles)
        parts.append(rows.read(tiles, buffers, brackets=place))
        if start >= num_kept and projected is not None:
            assert place is not None
            for bracket, direction in zip(place, projected, strict=True):
                out = direction[start - num_kept : stop - num_kept]
                product(bracket, rows.policy.weight, out=out)
    dtype = accumulation_dtype(pair.policy.hidden.dtype)
    return PairStatistics.joined(parts, torch.empty(0, dtype=dtype, device=kept.device))


def backward(
    pair: HeadPair,
    buffers: PairBuffers,
    gradients: Gradients,
    *,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    kept: Tensor,
    projected: Tensor | None = None,
) -> None:
    """Writes the gradients, given those (N,) of log-probs, entropies and KLs; None: zeros.

    Without an entropy gradient, what the forward kept is combined; with one, every row's logits
    are computed again, because entropy asks for another combination of them.
    """
    num_rows, ignored = pair.policy.hidden.shape[0], pair.policy.ignored
    zeros = torch.zeros(num_rows, dtype=accumulation_dtype(kept.dtype), device=kept.device)
    upstream = Upstream(
        *(
            zeros if values is None else values.masked_fill(ignored, 0.0)
            for values in (grad_logprob, grad_entropy, grad_kl)
        )
    )
    num_kept = 0 if grad_entropy is not None else kept.shape[1]
    used = [index for index, values in enumerate((grad_logprob, grad_kl)) if values is not None]
    _add_kept(pair, buffers, gradients, upstream, kept[:, :num_kept], used)
    if grad_entropy is None and projected is not None:
        if gradients.hidden is not None:
            _add_projected(gradients.hidden[num_kept:], projected, upstream, ignored, used)
        return
    for start, stop in tile_spans(num_rows - num_kept, 0, buffers.tile_rows):
        start, stop = start + num_kept, stop + num_kept
        rows, tiles = pair.rows(start, stop), buffers.tiles(stop - start)
        place = buffers.converted(stop - start)[0]
        rows.project(tiles)
        rows.read(tiles, buffers, gradient=place, upstream=upstream.rows(start, stop))
        add_products(place, rows.policy, gradients.rows(start, stop), None)


def _add_kept(
    pair: HeadPair,
    buffers: PairBuffers,
    gradients: Gradients,
    upstream: Upstream,
    kept: Tensor,
    used: list[int],
) -> None:
    """The gradient products of kept (2, K, V), of which those in `used` have an upstream."""
    num_kept = kept.shape[1]
    tile_rows = max(num_kept, 1) if len(used) == 1 else buffers.tile_rows
    for start, stop in tile_spans(num_kept, 0, tile_rows):
        rows, scales = pair.rows(start, stop), upstream.rows(start, stop)
        coefficients = (scales.logprob, scales.kl)
        if len(used) == 1:
            bracket, scale = kept[used[0], start:stop], coefficients[used[0]]
        else:
            place = buffers.converted(stop - start)[0]
            bracket, scale = _combined(kept[:, start:stop], *coefficients, place)
        add_products(bracket, rows.policy, gradients.rows(start, stop), scale)


def _combined(
    brackets: Tensor, grad_logprob: Tensor, grad_kl: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    """A matrix in `place` (n, V) and a scale (n,) whose product is both brackets' combination.

    The larger coefficient of a row becomes one, so that in bfloat16 only the smaller is rounded;
    they take the brackets' dtype, because PyTorch on a CPU would copy brackets into another one.
    """
    scale = torch.maximum(grad_logprob.abs(), grad_kl.abs())
    safe = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    g, k = ((values / safe).to(brackets.dtype)[:, None] for values in (grad_logprob, grad_kl))
    torch.mul(brackets[0], g, out=place).addcmul_(brackets[1], k)
    return place, scale


def _add_projected(
    hidden: Tensor, projected: Tensor, upstream: Upstream, ignored: Tensor, used: list[int]
) -> None:
    """Writes the gradient of the hidden states' last rows, from both brackets @ W of those."""
    first = ignored.shape[0] - hidden.shape[0]
    coefficients = (upstream.logprob[first:], upstream.kl[first:])
    terms = [scaled_rows(projected[i], coefficients[i], ignored[first:]) for i in used]
    hidden.copy_(sum(terms[1:], terms[0]))
