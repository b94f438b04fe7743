"""`fused_linear_loss`: any loss of per-token log-probs, with its gradient in the forward."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastalign.ops.head.arguments import (
    LinearBackend,
    check_head,
    check_targets,
    check_transform,
    choose_linear_backend,
    resolve_budget,
    resolve_compute_dtype,
    temperature_tensor,
)
from fastalign.ops.head.fused_linear_loss import chunked, reference, sharded, traced
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head, lora_operands
from fastalign.ops.head.linear_logprob.operands import Needs, head_inputs
from fastalign.ops.head.linear_logprob.shard_arguments import ShardedHead
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
    """The loss () of a head's log-probs, and its metrics, without the (T, V) logits.

    The gradient is computed in the forward: a chunk of whole groups is projected, `loss_fn` is
    differentiated on the chunk's log-probs, and the gradient products follow at once. The backward
    only multiplies by the upstream gradient, in place, and can run once. Products (FLOPs over
    T*D*V): 2 without gradients, 4 where the weight is frozen, otherwise 6; of a group too large
    for the budget, the rows that cannot be kept are computed again (up to 8).

    Under torch.compile, which needs `segments` on the host, the loss is traced and the gradient
    computed in the backward, with the same products for all rows that the budget keeps.

    With a `vocabulary_shard`, see `linear_logprob`; the loss too is called on every rank, on the
    same log-probs, and must do the same there. The backward communicates nothing.

    Args:
        hidden: Hidden states, any float dtype.
        weight: The head's weight, or the whole head: then without its fields as keywords.
        targets: Token ids; `ignore_index` gives log-prob 0 and no gradient.
        segments: Row bounds of the groups that `loss_fn` must see together, from 0 to T; on the
            host, or a GPU is waited for. None: every row is a group of its own.
        loss_fn: Takes a `TokenChunk`, returns a scalar and metrics. Called once for each chunk;
            losses and metrics are summed over chunks, so a normaliser must be that of the whole
            batch. Log-probs and entropies get gradients through it; a loss that uses entropies
            has the logits computed again (8 in place of 6).
        bias: The head's bias.
        temperature: As in `linear_logprob`.
        softcap: As in `linear_logprob`.
        logit_scale: As in `linear_logprob`.
        ignore_index: As in `linear_logprob`.
        lora: As in `linear_logprob`.
        compute_dtype: As in `linear_logprob`.
        max_buffer_bytes: As in `linear_logprob`.
        backend: As in `linear_logprob`; "reference": all the logits, by autograd.
        vocabulary_shard: As in `linear_logprob`.

    Returns:
        The summed loss, float32 (float64 where products are in float64), and the summed metrics.

    Raises:
        ValueError: A wrong shape, dtype, device, target, bound, number or backend, or too small a
            budget, or a `loss_fn` whose loss is not a scalar.
    """
    whole = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    weight, bias, softcap, logit_scale = whole.weight, whole.bias, whole.softcap, whole.logit_scale
    lora, vocabulary_shard = whole.lora, whole.shard
    if vocabulary_shard is not None:
        numbers = (temperature, softcap, logit_scale, ignore_index, lora, compute_dtype)
        shared = ShardedHead(
            vocabulary_shard, hidden, weight, bias, targets, *numbers, max_buffer_bytes, backend
        )

        def read_bounds() -> list[int] | None:
            return None if segments is None else _host_bounds(segments, hidden.shape[0])

        loss, metrics = sharded.fused_linear_loss(shared, read_bounds, loss_fn)
        return loss, metrics
    check_head(hidden, weight, targets, bias)
    check_targets(targets, weight.shape[0], ignore_index)
    check_transform(softcap, logit_scale)
    dtype = resolve_compute_dtype(hidden, weight, compute_dtype)
    rows_temperature = temperature_tensor(temperature, hidden)
    bounds = None if segments is None else _host_bounds(segments, hidden.shape[0])
    chosen = choose_linear_backend("fused_linear_loss", backend, hidden.device.type, dtype)
    of_lora = lora_operands(lora, hidden, weight, dtype)
    options = (rows_temperature, softcap, float(logit_scale), ignore_index, dtype, *of_lora)
    num_groups = hidden.shape[0] if bounds is None else len(bounds) - 1
    arguments = (hidden, weight, bias, targets, num_groups, loss_fn, *options)
    if chosen == "reference":
        return reference.forward(*arguments)
    leaves = (hidden, weight, bias, *of_lora)
    enabled = torch.is_grad_enabled()
    wanted = [enabled and leaf is not None and leaf.requires_grad for leaf in leaves]
    most = resolve_budget(max_buffer_bytes, weight, dtype)
    if torch.compiler.is_compiling():
        return traced.forward(*arguments, max_buffer_bytes=most, needs=wanted, backend=chosen)
    needs = Needs(*wanted)
    with torch.no_grad():
        head = head_inputs(hidden, weight, bias, targets, *options)
    budget = chunked.Budget(weight.shape[0], dtype, hidden.device, most, needs, chosen)
    return chunked.forward(head, bounds, loss_fn, budget, leaves)


def _host_bounds(segments: Tensor | Sequence[int], num_rows: int) -> list[int]:
    """The bounds as a list.

    Raises:
        ValueError: They do not rise from 0 to the number of rows.
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
