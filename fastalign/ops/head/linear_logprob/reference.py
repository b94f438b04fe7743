"""The definition of `linear_logprob`, with all the logits: eager and differentiable."""

import torch
from torch import Tensor

from fastalign.ops.head.products import accumulation_dtype


def head_logits(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (1,) or (T,)
    softcap: float | None,
    logit_scale: float,
    compute_dtype: torch.dtype,
    lora_hidden: Tensor | None = None,  # (T, r)
    lora_weight: Tensor | None = None,  # (V, r)
) -> Tensor:
    """The logits (T, V) in the accumulation dtype, from operands rounded to `compute_dtype`."""
    dtype = accumulation_dtype(compute_dtype)

    def multiplied(rows: Tensor, columns: Tensor) -> Tensor:
        return rows.to(compute_dtype).to(dtype) @ columns.to(compute_dtype).to(dtype).t()

    logits = multiplied(hidden, weight)
    if lora_hidden is not None and lora_weight is not None:
        logits = logits + multiplied(lora_hidden, lora_weight)
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / temperature.to(dtype).reshape(-1, 1)
    return logits


def row_statistics(
    logits: Tensor, targets: Tensor, ignored: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and is_argmax, each (T,), of logits (T, V); zeros where ignored."""
    log_p = torch.log_softmax(logits, dim=-1)
    logprob = log_p.gather(1, targets[:, None]).squeeze(1)
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # a banned token, p = 0, adds nothing
    entropy = -(log_p.exp() * finite).sum(dim=-1)
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    is_argmax = (chosen >= logits.amax(dim=-1)) & ~ignored
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), is_argmax
