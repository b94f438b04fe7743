"""Numbers of many responses under a model: sequence log-probs, or any other of a batch."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.schedule import packed_batches, packed_lengths
from fastalign.compute import Packing
from fastalign.models.head import lm_head
from fastalign.models.packed import predict_hidden
from fastalign.ops import linear_logprob
from fastalign.ops.segments import segment_sum
from fastalign.ranks.parallel import enter
from fastalign.ranks.world import ALONE, World


@torch.no_grad()
def of_responses(
    of_batch: Callable[[PackedBatch], Tensor],
    groups: Sequence[Group],
    *,
    device: torch.device,
    packing: Packing,
    tokens_per_batch: int,
    dtype: torch.dtype,
    world: World = ALONE,
) -> list[Tensor]:
    """A number for each response, computed batch by batch, shared by the ranks.

    Args:
        of_batch: (R,) numbers of a batch's responses.
        groups: prompts with their responses.
        device: of the batches.
        packing: see `hidden_at`.
        tokens_per_batch: most packed tokens of a forward.
        dtype: of the matrix products: float32, or bfloat16 by autocast.
        world: the ranks, all of which call this with the same groups.

    Returns:
        For each group (number of responses,) on the CPU, on every rank.
    """
    results: dict[int, Tensor] = {}
    lengths = packed_lengths(groups, repeat_prompts=packing != "shared_prefix")
    batches = packed_batches(
        groups,
        range(len(groups)),
        lengths,
        tokens_per_batch=tokens_per_batch,
        share_prompts=packing != "packed",
        world=world,
    )
    low = dtype != torch.float32
    for chosen, on_host, counts in batches:
        with torch.autocast(device.type, dtype=dtype) if low else nullcontext():
            values = of_batch(on_host.to(device)).cpu()
        if counts:
            sizes = [len(groups[i].response_ids) for i in chosen]
            results.update(zip(chosen, torch.split(values, sizes), strict=True))
    found = {i: values for part in world.gather(results) for i, values in part.items()}
    return [found[i] for i in range(len(groups))]


def sequence_logprobs(
    model: Any,
    groups: Sequence[Group],
    *,
    packing: Packing = "shared_prefix",
    tokens_per_batch: int = 16384,
    dtype: torch.dtype = torch.float32,
    max_buffer_bytes: int | None = None,
    world: World = ALONE,
) -> list[Tensor]:
    """Log-prob of each response, summed over its trained tokens.

    Args:
        model: a causal model from `load_policy`.
        groups: prompts with their responses.
        packing: see `hidden_at`.
        tokens_per_batch: most packed tokens of a forward.
        dtype: of the matrix products: float32, or bfloat16 by autocast.
        max_buffer_bytes: most bytes of logits at a time; None: the operation's default.
        world: the ranks, all of which call this with the same groups.

    Returns:
        For each group (number of responses,) float32 on the CPU.
    """

    def of_batch(batch: PackedBatch) -> Tensor:
        logprob = enter(
            model,
            lambda: response_logprob(
                model,
                batch,
                packing=packing,
                compute_dtype=dtype if dtype != torch.float32 else None,
                max_buffer_bytes=max_buffer_bytes,
            ),
        )
        return segment_sum(logprob, batch.target_bounds)

    return of_responses(
        of_batch,
        groups,
        device=lm_head(model).weight.device,  # of an offloaded model, nothing else stays there
        packing=packing,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        world=world,
    )


def response_logprob(
    model: Any,
    batch: PackedBatch,
    *,
    packing: Packing,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """Log-prob of every trained token.

    Args:
        model: a causal model from `load_policy`.
        batch: on the model's device.
        packing: see `predict_hidden`.
        temperature: divides the logits.
        compute_dtype: dtype of the matrix products; None: the hidden states'.
        max_buffer_bytes: most bytes of logits at a time; None: the operation's default.

    Returns:
        (N,) float32 (float64 for a float64 model).
    """
    hidden = predict_hidden(model, batch, packing=packing)
    return linear_logprob(
        hidden,
        lm_head(model),
        batch.targets,
        temperature=temperature,
        compute_dtype=compute_dtype,
        max_buffer_bytes=max_buffer_bytes,
    )
