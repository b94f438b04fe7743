"""`linear_logprob`: hidden states to log-probs without all the logits."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastalign.ops.head.arguments import HeadOptions, LinearBackend, check_call
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.linear_logprob.op import linear_logprob_forward
from fastalign.ops.head.linear_logprob.reference import head_logits, row_statistics
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
    """Compute log-probs (T,) of `targets` under a language-model head, and entropies (T,).

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
        hidden: (T, D) hidden states, any float dtype, any strides.
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; `ignore_index` gives log-prob 0, entropy 0 and no gradient.
        temperature: positive number, or one per row, that divides the logits; gets no gradient.
        return_entropy: also return each row's entropy, in nats.
        ignore_index: target of ignored rows.
        compute_dtype: dtype of the products. None: autocast's where it is on, else the operands'.
            A float32 master weight with torch.bfloat16 here gets its gradient in float32.
        max_buffer_bytes: most memory for logits, scratch and saved brackets together.
            None: 12,288 bytes on a GPU and 3,072 on a CPU for each of the V columns (4,096 or
            1,024 rows in bfloat16, and a tile), at least 64 MiB, halved until it is at most half
            of the free memory.
        backend: code that reads the logits, tile by tile: "native" (C++ or CUDA), "triton" or
            "torch"; "auto" takes the first that is usable here, a named one runs or raises.
            "epilogue": without gradients, statistics that a Triton product takes of its own
            results, so that no logit is written to memory (bfloat16 and float16, on GPUs from
            compute capability 9.0; float32 without tensor cores). "auto" takes it where
            `benchmarks.tune` found it faster. "reference": the lines above, in one process only.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` (`shard`) are the
    fields of :class:`fastalign.LinearHead`, which may hold them instead.

    Returns:
        log-probs in float32 (float64 where products are in float64), or (log-probs, entropies).

    Raises:
        ValueError: if a shape, dtype, device, target, number or backend is wrong, or the budget too
            small; if shards do not cover the vocabulary, or arguments differ between ranks.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    logprob, entropy = head_logprob(hidden, head, targets, options, return_entropy=return_entropy)
    return (logprob, entropy) if return_entropy else logprob


def head_logprob(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    options: HeadOptions,
    *,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probs (T,) and entropies (T,), zeros where not wanted: see `linear_logprob`."""
    if head.shard is not None:
        from fastalign.ops.head import sharded  # loads torch's compiler

        found = sharded.linear_logprob(hidden, head, targets, options, return_entropy)
        return found[0], found[1]
    arguments = ("linear_logprob", hidden, head, targets, options)
    logprob, entropy, _ = read_head(check_call(*arguments, return_entropy=return_entropy))
    return logprob, entropy


def read_head(call: HeadCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob, entropy and is_argmax, each (T,), of a checked call of one process."""
    if call.backend == "reference":
        return row_statistics(head_logits(call), call.targets, call.ignore_index)
    logprob, entropy, is_argmax, *_ = linear_logprob_forward(*call)
    return logprob, entropy, is_argmax
