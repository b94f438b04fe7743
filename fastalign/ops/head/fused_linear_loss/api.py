"""`fused_linear_loss`: any loss of per-token log-probs, with its gradient in the forward."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastalign.ops.head.arguments import HeadOptions, LinearBackend, check_call
from fastalign.ops.head.fused_linear_loss import chunked
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, loss_of_all
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.linear_logprob.api import read_head
from fastalign.ops.head.vocabulary_shard import VocabularyShard


def fused_linear_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    segments: Tensor | Sequence[int] | None,  # (G + 1,)
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraWeights | None = None,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
    backend: LinearBackend = "auto",
    vocabulary_shard: VocabularyShard | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss () of a head's log-probs, and its metrics, without the (T, V) logits.

    The gradient is computed in the forward: a chunk of whole groups is projected, `loss_fn` is
    differentiated on the chunk's log-probs, and the gradient products follow at once. Where the
    budget holds all rows in one chunk, the weight's product waits for the backward, which writes it
    in the weight's dtype; of several chunks the sum is in float32, and the backward multiplies it
    by the upstream gradient. It can run once. Products (FLOPs over T*D*V): 2 without gradients, 4
    where the weight is frozen, otherwise 6; of a group too large for the budget, the rows that
    cannot be saved are computed again (up to 8).

    Under torch.compile, which needs `segments` on the host, the loss is traced and the gradient
    computed in the backward, with the same products for all rows that the budget can save.

    With a `vocabulary_shard`, see `linear_logprob`; the loss too is called on every rank, on the
    same log-probs, and must do the same there. The backward communicates nothing.

    Args:
        hidden: (T, D) hidden states, any float dtype.
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; `ignore_index` gives log-prob 0 and no gradient.
        segments: (G + 1,) row bounds of the groups that `loss_fn` must see together, from 0 to T;
            on the host, or the call synchronises with a GPU. None: every row is its own group.
        loss_fn: function from a `TokenChunk` to a scalar and metrics, called once for each chunk;
            losses and metrics are summed over chunks, so a normaliser must be that of the whole
            batch. Log-probs and entropies get gradients through it; a loss that uses entropies
            has the logits computed again (8 products instead of 6).

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`, with
    "reference": all the logits, by autograd.

    Returns:
        The summed loss, float32 (float64 where products are in float64), and the summed metrics.

    Raises:
        ValueError: if a shape, dtype, device, target, bound, number or backend is wrong, the budget
            too small, or the loss of `loss_fn` not a scalar.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    return head_loss(hidden, head, targets, segments, loss_fn, options)


def head_loss(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    segments: Tensor | Sequence[int] | None,
    loss_fn: LossFunction,
    options: HeadOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () and metrics: see `fused_linear_loss`."""
    if head.shard is not None:
        from fastalign.ops.head import sharded  # loads torch's compiler

        found: tuple[Tensor, dict[str, Tensor]] = sharded.fused_linear_loss(
            hidden, head, targets, segments, loss_fn, options
        )
        return found
    call = check_call("fused_linear_loss", hidden, head, targets, options)
    bounds = None if segments is None else host_bounds(segments, hidden.shape[0])
    if call.backend == "reference" or torch.compiler.is_compiling():
        # A gradient in the forward cannot be traced through a function that is only known as
        # Python. So the loss is traced, on the results of `linear_logprob`, whose backward
        # multiplies the brackets that its forward saved: the same products while the budget holds
        # all rows.
        num_groups = hidden.shape[0] if bounds is None else len(bounds) - 1
        is_target = targets != options.ignore_index
        return loss_of_all(loss_fn, *read_head(call), is_target, num_groups)
    return chunked.forward(call, bounds, loss_fn)


def host_bounds(segments: Tensor | Sequence[int], num_rows: int) -> list[int]:
    """Return the bounds as a list.

    Raises:
        ValueError: if they do not rise from 0 to the number of rows.
    """
    if isinstance(segments, Tensor):
        if segments.ndim != 1 or segments.is_floating_point():
            raise ValueError(
                f"segments: expected integers (G + 1,), got {segments.dtype} "
                f"{tuple(segments.shape)}"
            )
        bounds: list[int] = segments.tolist()
    else:
        bounds = list(segments)
    if not bounds or bounds[0] != 0 or bounds[-1] != num_rows:
        ends = f"{bounds[0]}..{bounds[-1]}" if bounds else "no bounds"
        raise ValueError(f"segments: expected bounds from 0 to {num_rows} rows, got {ends}")
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"segments: expected bounds that do not fall, got {start}, {stop} at group {group}"
            )
    return bounds
