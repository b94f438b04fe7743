"""The definition of `linear_logprob`, with all the logits: eager and differentiable.

Legend: T rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.products import accumulation_dtype
from fastalign.ops.target_columns import target_columns


def head_logits(call: HeadCall) -> Tensor:
    """Return the logits (T, V) in the accumulation dtype, from rounded operands.

    With a temperature they are less by a constant of each row: see `token_logprob`'s `transformed`.
    """
    dtype = accumulation_dtype(call.compute_dtype)

    def multiplied(rows: Tensor, columns: Tensor) -> Tensor:
        rows, columns = (v.to(call.compute_dtype).to(dtype) for v in (rows, columns))
        return rows @ columns.t()

    logits = multiplied(call.hidden, call.weight)
    if call.lora_hidden is not None and call.lora_weight is not None:
        logits = logits + multiplied(call.lora_hidden, call.lora_weight)
    if call.bias is not None:
        logits = logits + call.bias.to(dtype)
    logits = logits * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.temperature is not None:
        shifted = logits - logits.detach().amax(-1, keepdim=True)
        logits = shifted / call.temperature.to(dtype).reshape(-1, 1)
    return logits


def row_statistics(
    logits: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob, entropy and is_argmax, each (T,), of logits (T, V); zeros where ignored.

    The log-prob is NaN where the target is no column, and so is the gradient of it.
    """
    ignored = targets == ignore_index
    columns, factor = target_columns(targets, ignored, logits.shape[1], logits.dtype)
    # PyTorch's log_softmax adds up the terms of a large vocabulary one by one; `sum` adds pairwise.
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    log_p = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    logprob = (log_p.gather(1, columns) * factor).squeeze(1)
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # a banned token, p = 0, adds nothing
    entropy = -(log_p.exp() * finite).sum(dim=-1)
    chosen = (logits.gather(1, columns) * factor).squeeze(1)
    is_argmax = (chosen >= logits.amax(dim=-1)) & ~ignored
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), is_argmax
