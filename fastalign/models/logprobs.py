"""Numbers for many responses under a model: sequence log-probs or any other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.schedule import packed_batches, packed_lengths
from fastalign.compute import Compute
from fastalign.models.head import lm_head
from fastalign.models.packed import predict_hidden
from fastalign.ops import linear_logprob
from fastalign.ops.segments import segment_sum
from fastalign.ranks.parallel import enter


@torch.no_grad()
def response_values(
    batch_values: Callable[[PackedBatch], Tensor], groups: Sequence[Group], compute: Compute
) -> list[Tensor]:
    """Compute a number for each response, batch by batch, shared by the ranks.

    Args:
        batch_values: returns (R,) numbers for the responses of a batch on `compute.device`.
        groups: prompts with their responses; the same on every rank.
        compute: device, packing, token budget and ranks, all of which call this.

    Returns:
        For each group (number of responses,) on the CPU, on every rank.
    """
    results: dict[int, Tensor] = {}
    lengths = packed_lengths(groups, compute.packing)
    for chosen, batch, counts in packed_batches(groups, range(len(groups)), lengths, compute):
        values = batch_values(batch.to(compute.device)).cpu()
        if counts:
            sizes = [len(groups[i].response_ids) for i in chosen]
            results.update(zip(chosen, torch.split(values, sizes), strict=True))
    found = {i: values for part in compute.world.gather(results) for i, values in part.items()}
    return [found[i] for i in range(len(groups))]


def sequence_logprobs(model: Any, groups: Sequence[Group], compute: Compute) -> list[Tensor]:
    """Return the log-prob of each response, summed over its trained tokens.

    Args:
        model: a causal model from `load_policy`, its head on `compute.device`.
        groups: prompts with their responses; the same on every rank.
        compute: how forwards are run, and by which ranks, all of which call this.

    Returns:
        For each group (number of responses,) float32 on the CPU.
    """

    def batch_logprobs(batch: PackedBatch) -> Tensor:
        logprob = enter(model, lambda: response_logprob(model, batch, compute))
        return segment_sum(logprob, batch.target_bounds)

    return response_values(batch_logprobs, groups, compute)


def response_logprob(
    model: Any, batch: PackedBatch, compute: Compute, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-prob of every trained token.

    Args:
        model: a causal model from `load_policy`.
        batch: batch on the model's device.
        compute: packing, dtype and buffer limit.
        temperature: divisor of the logits.

    Returns:
        (N,) float32 (float64 for a float64 model).
    """
    hidden = predict_hidden(model, batch, compute)
    return linear_logprob(
        hidden,
        lm_head(model),
        batch.targets,
        temperature=temperature,
        compute_dtype=compute.product_dtype,
        max_buffer_bytes=compute.max_buffer_bytes,
    )
