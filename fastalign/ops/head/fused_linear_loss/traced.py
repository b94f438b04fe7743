"""`fused_linear_loss` inside torch.compile: the loss is traced, on the results of one operation.

A gradient in the forward cannot be traced through a function that is only known as Python. So the
loss stands on `linear_logprob`, whose backward multiplies the brackets that its forward kept: the
same products while the budget holds all rows.
"""

import torch
from torch import Tensor

from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, loss_of_all
from fastalign.ops.head.linear_logprob.op import linear_logprob_forward


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
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    *,
    max_buffer_bytes: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () and metrics; differentiable by autograd."""
    logprob, entropy, is_argmax, _, _ = linear_logprob_forward(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        lora_hidden,
        lora_weight,
        softcap,
        logit_scale,
        ignore_index,
        compute_dtype,
        max_buffer_bytes,
        needs,
        True,
        backend,
    )
    return loss_of_all(loss_fn, logprob, entropy, is_argmax, targets != ignore_index, num_groups)
