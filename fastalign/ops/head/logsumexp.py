"""`linear_logsumexp`, and single logits of a head: products of rows, without all the logits.

The log-sum-exp of a row is its target's logit less the target's log-prob, so it needs no other pass
over the vocabulary than the log-prob's; its derivative by the logits is the softmax.

Legend: T rows, V vocabulary, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.head.arguments import HeadOptions, LinearBackend, resolve_compute_dtype
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.linear_logprob.api import head_logprob
from fastalign.ops.head.products import accumulation_dtype


def linear_logsumexp(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
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
) -> tuple[Tensor, Tensor]:
    """Compute log-probs (T,) of `targets`, and the log-sum-exp (T,) of each row's logits.

    The same as these lines, without their (T, V) tensors:

        logits = (hidden @ weight.T).float() / temperature
        logsumexp = logits.logsumexp(-1)
        logprob = logits[arange(T), targets] - logsumexp

    Differentiable in hidden, weight, bias and LoRA's matrices, through both results. Beyond
    `linear_logprob` it gathers (T, D) rows of the weight, whose gradient is a (V, D) tensor of
    its own.

    Args:
        hidden: (T, D) hidden states.
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` give zeros and no gradient.

    The keywords are those of :func:`fastalign.linear_logprob`.

    Returns:
        (log-probs, log-sum-exps), float32 (float64 where products are in float64).

    Raises:
        ValueError: as `linear_logprob`; also if the vocabulary is sharded.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    logprob, _ = head_logprob(hidden, head, targets, options)
    logit = target_logits(hidden, head, targets, options)
    return logprob, torch.where(targets == ignore_index, 0.0, logit - logprob)


def target_logits(
    hidden: Tensor, head: LinearHead, targets: Tensor, options: HeadOptions
) -> Tensor:
    """Return the logit of each row's target (T,), over the temperature; of ignored rows any.

    Raises:
        ValueError: if the vocabulary is sharded.
    """
    check_whole(head)
    ids = targets.masked_fill(targets == options.ignore_index, 0)
    rows, low, wide = operands(hidden, head, options)
    logit = (rows * head.weight[ids].to(low).to(wide)).sum(-1)
    if head.lora is not None:
        inner = F.linear(rows, head.lora.lora_A.to(wide))
        logit = logit + head.lora.scaling * (inner * head.lora.lora_B[ids].to(wide)).sum(-1)
    if head.bias is not None:
        logit = logit + head.bias[ids].to(wide)
    logit = head.logit_scale * logit
    if head.softcap is not None:
        logit = head.softcap * torch.tanh(logit / head.softcap)
    return logit / options.temperature


def weighted_mean_logits(
    hidden: Tensor, head: LinearHead, class_weight: Tensor | None, options: HeadOptions
) -> Tensor:
    """Return the mean over the vocabulary of weight times logit, (T,), over the temperature.

    It is the product with one row, the weighted mean of the head's; a softcap forbids that.

    Raises:
        ValueError: if the head has a softcap, or the vocabulary is sharded.
    """
    check_whole(head)
    if head.softcap is not None:
        raise ValueError(
            "label_smoothing: expected 0 for a head with a softcap, whose mean logit would need "
            f"every logit, got a softcap of {head.softcap}"
        )
    rows, low, wide = operands(hidden, head, options)

    def mean(values: Tensor) -> Tensor:  # (V, ...) -> (...)
        values = values.to(wide)
        if class_weight is None:
            return values.mean(0)
        total: Tensor = torch.tensordot(class_weight.to(wide), values, 1)
        return total / len(values)

    logit = rows @ mean(head.weight.to(low))
    if head.lora is not None:
        inner = F.linear(rows, head.lora.lora_A.to(wide))
        logit = logit + head.lora.scaling * (inner @ mean(head.lora.lora_B))
    if head.bias is not None:
        logit = logit + mean(head.bias)
    return head.logit_scale * logit / options.temperature


def operands(
    hidden: Tensor, head: LinearHead, options: HeadOptions
) -> tuple[Tensor, torch.dtype, torch.dtype]:
    """Return the rows, rounded; the dtype that the head's products round to; and a wide one."""
    low = resolve_compute_dtype(hidden, head.weight, options.compute_dtype)
    wide = accumulation_dtype(low)
    return hidden.to(low).to(wide), low, wide


def check_whole(head: LinearHead) -> None:
    """Raise ValueError if the head holds a part of the vocabulary."""
    if head.shard is not None:
        raise ValueError(
            "vocabulary_shard: expected none with label smoothing, class weights or a z-loss, "
            "which read single rows of the weight, got one"
        )
