"""The head in tiles: log-probs forward, products backward, with a bounded number of logits.

`forward` and `backward` work on operands (already rounded, see `linear_products.operand`) and know
nothing of autograd; `linear_logprob` and `fused_linear_loss` both stand on them.

Legend: N rows, V vocabulary, D hidden, K kept rows. Products, in units of N * D * V FLOPs:
forward 2, plus 2 for a frozen head; backward 4 for kept rows, 6 for others, 0 for a frozen head
(under LoRA, whose B needs the brackets too: 2 for kept rows, 4 for others).
"""

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.head_tile import RowStatistics, read_tile
from fastalign.ops.head.linear_logprob.operands import Gradients, HeadInputs
from fastalign.ops.head.products import accumulation_dtype, add_product, product


def forward(
    head: HeadInputs,
    buffers: Buffers,
    *,
    kept: Tensor | None = None,
    direction: Tensor | None = None,
    with_entropy: bool = True,
) -> RowStatistics:
    """Reads every row's statistics; keeps what the backward wants in the places given.

    Args:
        head: The operands, N rows.
        buffers: Scratch memory.
        kept: (K, V) in the products' dtype: receives the brackets of the first K rows.
        direction: (N, D) in the accumulation dtype: receives bracket @ W.
        with_entropy: Whether to compute entropies (zeros otherwise).
    """
    num_rows = head.hidden.shape[0]
    num_kept = 0 if kept is None else kept.shape[0]
    parts = []
    for start, stop in tile_spans(num_rows, num_kept, buffers.tile_rows):
        rows = head.rows(start, stop)
        place = kept[start:stop] if kept is not None and start < num_kept else None
        if place is not None and buffers.projects_in_place:
            tile = place
        else:
            tile = buffers.tile(stop - start)
        rows.project(out=tile)
        if place is None and direction is not None:
            place = buffers.converted(stop - start)
        parts.append(
            read_tile(
                tile,
                rows.targets,
                rows.ignored,
                rows.transform,
                buffers.backend,
                buffers.scratch,
                gradient=place,
                with_entropy=with_entropy,
            )
        )
        if direction is not None:
            assert place is not None
            product(place, rows.weight, out=direction[start:stop])
    return concatenate(parts, head.hidden)


def tile_spans(num_rows: int, num_kept: int, tile_rows: int) -> list[tuple[int, int]]:
    """Spans of at most `tile_rows` rows, none of them across the border of the kept rows."""
    spans = []
    for first, last in ((0, num_kept), (num_kept, num_rows)):
        for start in range(first, last, tile_rows):
            spans.append((start, min(start + tile_rows, last)))
    return spans


def concatenate(parts: list[RowStatistics], like: Tensor) -> RowStatistics:
    """The statistics of all tiles; of none, empty ones in the accumulation dtype of `like`."""
    if not parts:
        empty = torch.empty(0, dtype=accumulation_dtype(like.dtype), device=like.device)
        # two tensors: an operation's outputs may not be the same one
        return RowStatistics(empty, empty.clone(), empty.bool())
    return RowStatistics(
        torch.cat([part.logprob for part in parts]),
        torch.cat([part.entropy for part in parts]),
        torch.cat([part.is_argmax for part in parts]),
    )


def backward(
    head: HeadInputs,
    buffers: Buffers,
    gradients: Gradients,
    grad_logprob: Tensor,
    *,
    grad_entropy: Tensor | None = None,
    kept: Tensor | None = None,
    direction: Tensor | None = None,
) -> None:
    """Writes the gradients, given those of the log-probs (N,) and, or not, of the entropies (N,).

    Without an entropy gradient, what the forward kept is scaled; with one, every row's logits are
    computed again, because entropy asks for another combination of them.
    """
    num_rows = head.hidden.shape[0]
    grad_logprob = grad_logprob.masked_fill(head.ignored, 0.0)
    if grad_entropy is None and direction is not None:
        if gradients.hidden is not None:
            gradients.hidden.copy_(scaled_rows(direction, grad_logprob, head.ignored))
        return
    num_kept = 0 if kept is None or grad_entropy is not None else kept.shape[0]
    if kept is not None and num_kept:
        add_products(
            kept, head.rows(0, num_kept), gradients.rows(0, num_kept), grad_logprob[:num_kept]
        )
    for start, stop in tile_spans(num_rows - num_kept, 0, buffers.tile_rows):
        start, stop = start + num_kept, stop + num_kept
        rows = head.rows(start, stop)
        tile, place = buffers.tile(stop - start), buffers.converted(stop - start)
        rows.project(out=tile)
        read_tile(
            tile,
            rows.targets,
            rows.ignored,
            rows.transform,
            buffers.backend,
            buffers.scratch,
            gradient=place,
            grad_logprob=None if grad_entropy is None else grad_logprob[start:stop],
            grad_entropy=None if grad_entropy is None else grad_entropy[start:stop],
            with_entropy=False,
        )
        scale = grad_logprob[start:stop] if grad_entropy is None else None
        add_products(place, rows, gradients.rows(start, stop), scale)


def scaled_rows(rows: Tensor, scale: Tensor, ignored: Tensor) -> Tensor:
    """The rows times scale, and zero where ignored even if the row holds a NaN."""
    return (rows * scale[:, None].to(rows.dtype)).masked_fill_(ignored[:, None], 0.0)


def add_products(
    bracket: Tensor, head: HeadInputs, gradients: Gradients, scale: Tensor | None
) -> None:
    """The gradient products of bracket (n, V), whose rows count `scale` (n,) times, or once."""
    dtype = accumulation_dtype(head.hidden.dtype)
    if scale is None:
        scale = torch.ones_like(head.ignored, dtype=dtype)
    for weight, of_rows in (
        (head.weight, gradients.hidden),
        (head.lora_weight, gradients.lora_hidden),
    ):
        if of_rows is not None and weight is not None:
            direction = torch.empty(of_rows.shape, dtype=dtype, device=bracket.device)
            product(bracket, weight, out=direction)
            of_rows.copy_(scaled_rows(direction, scale, head.ignored))
    add_weight_products(bracket, head, gradients, scale)


def add_weight_products(
    bracket: Tensor, head: HeadInputs, gradients: Gradients, scale: Tensor
) -> None:
    """Adds the products that are gradients of weight, bias and LoRA's B."""
    dtype = accumulation_dtype(head.hidden.dtype)
    for rows, of_weight in (
        (head.hidden, gradients.weight),
        (head.lora_hidden, gradients.lora_weight),
    ):
        if of_weight is not None and rows is not None:
            weighted = scaled_rows(rows.to(dtype), scale, head.ignored).to(bracket.dtype)
            add_product(bracket.t(), weighted, out=of_weight)
    if gradients.bias is not None:
        column = scale[:, None].to(bracket.dtype)
        add_product(bracket.t(), column, out=gradients.bias[:, None])
