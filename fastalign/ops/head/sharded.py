"""The head's operations where a process group shares the vocabulary, in eager PyTorch.

This module loads torch's compiler, which takes a second: it is imported where a shard is given.

Legend: T rows, V this rank's columns, D hidden, K rows whose brackets are saved.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head import tiled
from fastalign.ops.head.arguments import HeadOptions, check_call, check_call_on_ranks
from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.call import NUM_TENSORS, HeadCall
from fastalign.ops.head.fused_linear_loss import chunked
from fastalign.ops.head.fused_linear_loss.api import host_bounds
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction
from fastalign.ops.head.head_tile import SoftmaxStatistics, Upstream
from fastalign.ops.head.linear_head import LinearHead
from fastalign.ops.head.sharded_tiles import ShardReader
from fastalign.ops.head.vocabulary_shard import VocabularyShard

in_eager_pytorch = torch.compiler.disable(  # type: ignore[no-untyped-call]
    reason="vocabulary_shard: ranks communicate in eager PyTorch"
)


@in_eager_pytorch  # type: ignore[untyped-decorator]
def linear_logprob(
    hidden: Tensor, head: LinearHead, targets: Tensor, options: HeadOptions, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probs (T,) and entropies (T,), zeros where not wanted.

    Raises:
        ValueError: as the public function, on every rank.
    """
    arguments = ("linear_logprob", hidden, head, targets, options)
    check = partial(check_call, *arguments, return_entropy=return_entropy)
    call = check_call_on_ranks(check, head, options, lambda: {"return_entropy": return_entropy})
    logprob, entropy = _ShardedLogprob.apply(head.shard, *call)  # type: ignore[no-untyped-call]
    return logprob, entropy


def _buffers(call: HeadCall, shard: VocabularyShard) -> Buffers:
    """Return scratch memory, planned for the largest shard."""
    columns = shard.num_planned_columns
    budget = call.budget(reread=call.return_entropy, planned_columns=columns)
    return budget.buffers(call.hidden.shape[0])


class _ShardedLogprob(torch.autograd.Function):
    """`fastalign::linear_logprob`, which also saves each row's softmax over all columns."""

    @staticmethod
    def forward(ctx: Any, shard: VocabularyShard, *arguments: Any) -> tuple[Tensor, Tensor]:
        call = HeadCall(*arguments)
        with torch.autocast(call.hidden.device.type, enabled=False):
            buffers = _buffers(call, shard)
            jacobian = call.new_jacobian() if call.wanted.only_hidden else None
            saved = tiled.Saved(buffers.new_brackets(), jacobian)
            reader, with_entropy = ShardReader(shard), call.return_entropy
            read = tiled.forward(
                call.inputs(), buffers, saved, with_entropy=with_entropy, reader=reader
            )
        softmax = saved.softmax or (None, None, None)
        ctx.save_for_backward(*call[:NUM_TENSORS], saved.brackets, jacobian, *softmax)
        ctx.shard, ctx.options = shard, call[NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return read.logprob, read.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        call = HeadCall(*tensors[:NUM_TENSORS], *ctx.options)
        if grad_logprob is None:
            if grad_entropy is None:
                return (None,) * (1 + len(call))
            grad_logprob = torch.zeros_like(grad_entropy)
        brackets, jacobian, *softmax = tensors[NUM_TENSORS:]
        known = None if softmax[0] is None else SoftmaxStatistics(*softmax)
        with torch.autocast(call.hidden.device.type, enabled=False):
            buffers, num_rows = _buffers(call, ctx.shard), call.hidden.shape[0]
            num_saved = 0 if grad_entropy is not None else brackets.shape[0]
            products = tiled.num_weight_products(num_rows, num_saved, buffers.tile_rows)
            gradients = call.new_gradients(single=products <= 1)
            tiled.backward(
                call.inputs(),
                buffers,
                gradients,
                tiled.Saved(brackets, jacobian, known),
                Upstream(grad_logprob, grad_entropy),
                ShardReader(ctx.shard),
            )
        return (None, *call.by_argument(gradients.results(call.leaves)))


@in_eager_pytorch  # type: ignore[untyped-decorator]
def fused_linear_loss(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    segments: Tensor | Sequence[int] | None,
    loss_fn: LossFunction,
    options: HeadOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () and metrics where a process group shares the vocabulary.

    The sweep over chunks is that of one process; every rank plans the same chunks, from the
    largest shard, and calls the loss on the same log-probs.

    Raises:
        ValueError: as the public function, on every rank.
    """
    bounds: list[int] | None = None

    def more() -> dict[str, str]:
        nonlocal bounds
        if segments is None:
            return {"segments": "None"}
        bounds = host_bounds(segments, hidden.shape[0])
        checksum = zlib.crc32(repr(bounds).encode())
        return {"segments": f"{len(bounds)} bounds with checksum {checksum:08x}"}

    check = partial(check_call, "fused_linear_loss", hidden, head, targets, options)
    call = check_call_on_ranks(check, head, options, more)
    assert head.shard is not None
    columns = head.shard.num_planned_columns
    return chunked.forward(call, bounds, loss_fn, columns, ShardReader(head.shard))
