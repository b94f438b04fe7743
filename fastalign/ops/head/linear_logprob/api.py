"""`linear_logprob`: hidden states to log-probs without all the logits."""

from typing import Literal, overload

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
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head, lora_operands
from fastalign.ops.head.linear_logprob import sharded
from fastalign.ops.head.linear_logprob.op import linear_logprob_forward
from fastalign.ops.head.linear_logprob.reference import head_logits, row_statistics
from fastalign.ops.head.linear_logprob.shard_arguments import ShardedHead
from fastalign.ops.head.vocabulary_shard import VocabularyShard


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor | LinearHead,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    lora: LoraWeights | None = ...,
    compute_dtype: torch.dtype | None = ...,
    max_buffer_bytes: int | None = ...,
    backend: LinearBackend = ...,
    vocabulary_shard: VocabularyShard | None = ...,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor | LinearHead,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    lora: LoraWeights | None = ...,
    compute_dtype: torch.dtype | None = ...,
    max_buffer_bytes: int | None = ...,
    backend: LinearBackend = ...,
    vocabulary_shard: VocabularyShard | None = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    lora: LoraWeights | None = None,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
    backend: LinearBackend = "auto",
    vocabulary_shard: VocabularyShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs (T,) of `targets` under a language-model head, and, if asked, the entropies (T,).

    The same as these lines, without their (T, V) tensors and with float32 logits throughout:

        logits = (hidden @ weight.T + scaling * (hidden @ lora_A.T) @ lora_B.T + bias) * logit_scale
        logits = softcap * tanh(logits / softcap) / temperature
        logprob = log_softmax(logits, dim=-1)[arange(T), targets]

    Differentiable in hidden, weight, bias and LoRA's matrices, through both results. Products
    (FLOPs over T*D*V): 2 without gradients; 4 where only `hidden` needs one, all in the forward;
    otherwise 6 (4 for a frozen weight under LoRA), plus 2 for the share of rows that
    `max_buffer_bytes` cannot keep (all of them, where it could keep less than a quarter). An
    entropy that nobody differentiates costs no product; one that somebody does has all logits
    computed again.

    With a `vocabulary_shard` every rank of the group calls this with its own rows of the weight and
    bias, and with everything else the same: hidden states, targets (global ids), options, trained
    tensors. Results are those of one process with the whole head, and the same on every rank to
    the bit. Each rank gets the whole gradient of `hidden` (summed over the ranks in float32; do not
    sum it again), and its own rows' of weight and bias. The backward communicates: all ranks run
    it, or none. Where the group has a backend for CPU tensors, every call begins with a few bytes
    on the host, so that all ranks raise when one has to; with NCCL alone the others wait for it.
    Chunks are planned from the largest shard, and the default budget not from free memory, so that
    every rank has the same ones. Under torch.compile the call is left to eager PyTorch: a graph
    break, or an error where the graph has to be full.

    Args:
        hidden: Hidden states, any float dtype, any strides.
        weight: The head's weight; may be the (tied) embedding, or a slice of a larger one. Or the
            whole head, a `LinearHead`: then without its fields as keywords.
        targets: Token ids; `ignore_index` gives log-prob 0, entropy 0 and no gradient.
        bias: The head's bias.
        temperature: A positive number, or one per row; gets no gradient.
        softcap: Gemma 2's final logit softcap (arXiv 2408.00118), or None.
        logit_scale: Cohere's multiplier, or one over Granite's divisor.
        return_entropy: Also return each row's entropy, in nats.
        ignore_index: The target that is ignored.
        lora: An adapter on the weight; W + B A is never formed.
        compute_dtype: The products' dtype. None: autocast's where it is on, else the operands'. A
            float32 master weight with torch.bfloat16 here gets its gradient in float32.
        max_buffer_bytes: The most memory for logits, scratch and kept brackets together.
            None: 12,288 bytes on a GPU and 3,072 on a CPU for each of the V columns (4,096 or
            1,024 rows in bfloat16, and a tile), at least 64 MiB, halved until it is at most half
            of the free memory.
        backend: What reads the logits, tile by tile: "native" (C++ or CUDA), "triton" or "torch";
            "auto" takes the first that is usable here, a named one runs or raises.
            "reference": the lines above, in one process only.
        vocabulary_shard: Which rows of the head `weight` and `bias` are; None: all of them.

    Returns:
        Log-probs in float32 (float64 where products are in float64), or (log-probs, entropies).

    Raises:
        ValueError: A wrong shape, dtype, device, target, number or backend, or too small a budget;
            shards that do not cover the vocabulary, or arguments that differ between ranks.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    weight, bias, softcap, logit_scale = head.weight, head.bias, head.softcap, head.logit_scale
    lora, vocabulary_shard = head.lora, head.shard
    if vocabulary_shard is not None:
        numbers = (temperature, softcap, logit_scale, ignore_index, lora, compute_dtype)
        shared = ShardedHead(
            vocabulary_shard, hidden, weight, bias, targets, *numbers, max_buffer_bytes, backend
        )
        logprob, entropy = sharded.linear_logprob(shared, return_entropy)
        return (logprob, entropy) if return_entropy else logprob
    check_head(hidden, weight, targets, bias)
    check_targets(targets, weight.shape[0], ignore_index)
    check_transform(softcap, logit_scale)
    dtype = resolve_compute_dtype(hidden, weight, compute_dtype)
    row_temperature = temperature_tensor(temperature, hidden)
    chosen = choose_linear_backend("linear_logprob", backend, hidden.device.type, dtype)
    lora_hidden, lora_weight = lora_operands(lora, hidden, weight, dtype)
    if chosen == "reference":
        options = (row_temperature, softcap, logit_scale, dtype, lora_hidden, lora_weight)
        logits = head_logits(hidden, weight, bias, *options)
        ignored = targets == ignore_index
        logprob, entropy, _ = row_statistics(logits, targets.masked_fill(ignored, 0), ignored)
    else:
        enabled = torch.is_grad_enabled()
        leaves = (hidden, weight, bias, lora_hidden, lora_weight)
        needs = [enabled and leaf is not None and leaf.requires_grad for leaf in leaves]
        logprob, entropy, *_ = linear_logprob_forward(
            hidden,
            weight,
            bias,
            targets,
            row_temperature,
            lora_hidden,
            lora_weight,
            softcap,
            float(logit_scale),
            ignore_index,
            dtype,
            resolve_budget(max_buffer_bytes, weight, dtype),
            needs,
            return_entropy,
            chosen,
        )
    return (logprob, entropy) if return_entropy else logprob
