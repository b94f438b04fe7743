"""Numbers of many responses under a model: sequence log-probs, or any other of a batch."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastalign.batch import Group, PackedBatch
from fastalign.data import packed_batches, packed_lengths
from fastalign.losses import segment_sum
from fastalign.models import Packing, lm_head, response_logprob


@torch.no_grad()
def of_responses(
    of_batch: Callable[[PackedBatch], Tensor],
    groups: Sequence[Group],
    *,
    device: torch.device,
    packing: Packing,
    tokens_per_batch: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """A number for each response, computed batch by batch.

    Args:
        of_batch: (R,) numbers of a batch's responses.
        groups: prompts with their responses.
        device: of the batches.
        packing: see `hidden_at`.
        tokens_per_batch: most packed tokens of a forward.
        dtype: of the matrix products: float32, or bfloat16 by autocast.

    Returns:
        For each group (number of responses,) on the CPU.
    """
    results: dict[int, Tensor] = {}
    lengths = packed_lengths(groups, repeat_prompts=packing != "shared_prefix")
    batches = packed_batches(
        groups,
        range(len(groups)),
        lengths,
        tokens_per_batch=tokens_per_batch,
        share_prompts=packing != "packed",
    )
    low = dtype != torch.float32
    for chosen, on_host in batches:
        with torch.autocast(device.type, dtype=dtype) if low else nullcontext():
            values = of_batch(on_host.to(device)).cpu()
        counts = [len(groups[i].response_ids) for i in chosen]
        results.update(zip(chosen, torch.split(values, counts), strict=True))
    return [results[i] for i in range(len(groups))]


def sequence_logprobs(
    model: Any,
    groups: Sequence[Group],
    *,
    packing: Packing = "shared_prefix",
    tokens_per_batch: int = 16384,
    dtype: torch.dtype = torch.float32,
    max_buffer_bytes: int | None = None,
) -> list[Tensor]:
    """Log-prob of each response, summed over its trained tokens.

    Args:
        model: a causal model from `load_policy`.
        groups: prompts with their responses.
        packing: see `hidden_at`.
        tokens_per_batch: most packed tokens of a forward.
        dtype: of the matrix products: float32, or bfloat16 by autocast.
        max_buffer_bytes: most bytes of logits at a time; None: the operation's default.

    Returns:
        For each group (number of responses,) float32 on the CPU.
    """

    def of_batch(batch: PackedBatch) -> Tensor:
        logprob = response_logprob(
            model,
            batch,
            packing=packing,
            compute_dtype=dtype if dtype != torch.float32 else None,
            max_buffer_bytes=max_buffer_bytes,
        )
        return segment_sum(logprob, batch.target_bounds)

    return of_responses(
        of_batch,
        groups,
        device=lm_head(model).weight.device,  # of an offloaded model, nothing else stays there
        packing=packing,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
    )
