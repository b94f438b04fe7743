"""The forward of a packed batch: hidden states, log-probs, and numbers of many responses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.schedule import packed_batches, packed_lengths
from fastalign.compute import Compute
from fastalign.models.architecture import backbone, rope_limit
from fastalign.models.attention.plan import AttentionPlan, RowPlan
from fastalign.models.head import lm_head
from fastalign.ops import LinearHead, linear_logprob
from fastalign.ops.recomputed import recomputed_outputs
from fastalign.ops.segments import segment_sum
from fastalign.progress import advance
from fastalign.ranks.parallel import enter, is_sharded

# Nats that rounding may move one token's log-prob by; those of a sequence are independent. About
# three times what was seen between packings in bfloat16; far above it in float32, where devices
# differ more than packings, and nothing that is wrong hides below it.
ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 0.25}


def check_same_start(
    policy: Tensor, reference: Tensor, num_tokens: Sequence[int], compute: Compute
) -> None:
    """Compare sequences' log-probs (S,) of a policy before its first step, which is its reference.

    Raises:
        ValueError: if one differs by more than rounding of its `num_tokens` explains.
    """
    allowed = ROUNDING[compute.dtype] * torch.tensor(num_tokens).clamp(min=1).sqrt()
    excess = (policy - reference).abs() - allowed
    if bool((excess > 0).any()):  # what is not finite is found elsewhere
        worst = int(excess.nan_to_num().argmax())
        raise ValueError(
            "model.path: before the first step the policy is the reference, but the log-prob of a "
            f"sequence is {policy[worst]:.6g} under the one and {reference[worst]:.6g} under the "
            f"other (rounding explains {allowed[worst]:.2g}): the model computes with something "
            "random, such as dropout of a kind that cannot be switched off"
        )


def hidden_at(
    model: Any,
    batch: PackedBatch,
    positions: Tensor,
    compute: Compute,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Return the hidden states after the final norm at K positions of the packed row.

    The forward runs under `compute.autocast()`.

    Args:
        model: from `load_policy` or `load_reward_model`.
        batch: batch on the model's device; with the packing `packed`, made with
            `share_prompts=False`.
        positions: (K,) int64, of responses and of prompts' last tokens.
        compute: packing and dtype.
        plan: the batch's attention plan, to reuse one; None: a new one.

    Returns:
        (K, D), in the dtype of the model's products.
    """
    check_rope_range(model, batch)
    with compute.autocast(), recomputed_outputs():
        if compute.packing == "padded":
            hidden, place = padded_hidden(model, batch)
            return hidden.index_select(0, place[positions])
        plan = AttentionPlan(batch) if plan is None else plan
        return row_hidden(model, batch, plan).index_select(0, positions)


def hidden_and_head(
    model: Any, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None = None
) -> tuple[Tensor, LinearHead]:
    """Return `hidden_at` the N positions that predict trained tokens, (N, D), and the head."""
    return hidden_at(model, batch, batch.predict_index, compute, plan), lm_head(model)


@torch.no_grad()
def frozen_hidden_and_head(
    model: Any, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None = None
) -> tuple[Tensor, LinearHead]:
    """Return `hidden_and_head` of a frozen model; if it is sharded, with a copy of its head."""

    def computation() -> tuple[Tensor, LinearHead]:
        hidden, head = hidden_and_head(model, batch, compute, plan)
        if not is_sharded(model):
            return hidden, head
        bias = None if head.bias is None else head.bias.clone()
        return hidden, replace(head, weight=head.weight.clone(), bias=bias)

    return enter(model, computation)


def check_rope_range(model: Any, batch: PackedBatch) -> None:
    """Raise ValueError if a batch's sequences need frequencies that one forward cannot have."""
    limit = rope_limit(model.config)
    if limit is None:
        return
    layout = batch.layout
    prompts = [last - first for first, last in layout.prompt_bounds]
    lengths = [
        prompts[prompt] + stop - start
        for (start, stop), prompt in zip(
            layout.response_bounds, layout.response_prompt, strict=True
        )
    ]
    if max(lengths) > limit.tokens and (not limit.has_long or min(lengths) <= limit.tokens):
        raise ValueError(
            f"sequences of {min(lengths)} to {max(lengths)} tokens cannot share a batch: under "
            f"rope_type {limit.kind!r} the frequencies depend on the longest beyond "
            f"{limit.tokens} tokens; expected at most these, prompt and response together"
        )


def row_hidden(model: Any, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
    """Return the hidden states (T, D) of the packed row under shared-prefix attention."""
    before = plan.num_attended
    output = _run_row(backbone(model), batch.input_ids, batch.position_ids, plan)
    assert plan.num_attended > before or plan.is_trial, "a model whose layers drop it is refused"
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def row_logits(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    plan: RowPlan,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the logits (K, V) at the K positions `keep` of a row (T,); None: at all of them."""
    options = {} if keep is None else {"logits_to_keep": keep}
    logits: Tensor = _run_row(model, input_ids, position_ids, plan, **options).logits[0]
    return logits


def _run_row(
    model: Any, input_ids: Tensor, position_ids: Tensor, plan: RowPlan, **options: Any
) -> Any:
    # A mask of four dimensions is passed through by transformers: no (T, T) mask is ever built.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=unused_mask,
        use_cache=False,
        fastalign_plan=plan,
        **options,
    )


def padded_hidden(model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Run the same tokens as right-padded sequences, one per response, L the longest.

    Returns:
        Hidden states (R * L, D), and the row of each packed token among them, (T,) int64. A prompt
        that several responses share is read from its first response: it is the same in all.
    """
    layout = batch.layout
    sequences = []
    for (start, stop), prompt in zip(layout.response_bounds, layout.response_prompt, strict=True):
        first, last = layout.prompt_bounds[prompt]
        sequences.append([*range(first, last), *range(start, stop)])
    longest = max(len(sequence) for sequence in sequences)
    place = [0] * batch.num_tokens
    for row in reversed(range(len(sequences))):
        for column, position in enumerate(sequences[row]):
            place[position] = row * longest + column
    index = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
    device = batch.input_ids.device

    def moved(values: list[Any]) -> Tensor:
        return torch.tensor(values).to(device, non_blocking=True)

    lengths = moved([len(sequence) for sequence in sequences])
    mask = torch.arange(longest, device=device) < lengths[:, None]
    input_ids = batch.input_ids[moved(index)] * mask
    output = backbone(model)(
        input_ids=input_ids, attention_mask=mask.to(torch.int64), use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1), moved(place)


def response_logprob(
    model: Any,
    batch: PackedBatch,
    compute: Compute,
    plan: AttentionPlan | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-prob of every trained token, (N,) float32 (float64 for a float64 model)."""
    return linear_logprob(
        *hidden_and_head(model, batch, compute, plan),
        batch.targets,
        temperature=temperature,
        compute_dtype=compute.product_dtype,
        max_buffer_bytes=compute.max_buffer_bytes,
    )


@torch.no_grad()
def response_values(
    batch_values: Callable[[PackedBatch], Tensor], groups: Sequence[Group], compute: Compute
) -> list[Tensor]:
    """Compute a number for each response, batch by batch, shared by the ranks.

    A `progress.phase` that is open is advanced by the number of responses. All ranks call this,
    with the same groups; `batch_values` returns (R,) numbers for the responses of a batch on
    `compute.device`.

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
            advance(sum(sizes) * compute.world.size)  # the other ranks have done as much
    found = {i: values for part in compute.world.gather(results) for i, values in part.items()}
    return [found[i] for i in range(len(groups))]


def sequence_logprobs(model: Any, groups: Sequence[Group], compute: Compute) -> list[Tensor]:
    """Return the log-prob of each response, summed over its trained tokens.

    All ranks call this, with the same groups.

    Returns:
        For each group (number of responses,) float32 on the CPU.
    """

    def batch_logprobs(batch: PackedBatch) -> Tensor:
        logprob = enter(model, lambda: response_logprob(model, batch, compute))
        return segment_sum(logprob, batch.target_bounds)

    return response_values(batch_logprobs, groups, compute)
