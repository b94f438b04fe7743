"""The definition of `fused_linear_loss`: all the logits, one chunk, autograd throughout."""

import torch
from torch import Tensor

from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, loss_of_all
from fastalign.ops.head.linear_logprob.reference import head_logits, row_statistics


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_groups: int,
    loss_fn: LossFunction,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () and metrics; differentiable in every operand by autograd alone."""
    options = (temperature, softcap, logit_scale, compute_dtype, lora_hidden, lora_weight)
    logits = head_logits(hidden, weight, bias, *options)
    ignored = targets == ignore_index
    logprob, entropy, is_argmax = row_statistics(logits, targets.masked_fill(ignored, 0), ignored)
    return loss_of_all(loss_fn, logprob, entropy, is_argmax, ~ignored, num_groups)
