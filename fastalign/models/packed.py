"""The forward of a packed batch: hidden states at the positions that predict a trained token."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastalign.batch import PackedBatch
from fastalign.models.attention import AttentionPlan

Packing = Literal["shared_prefix", "packed", "padded"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)


def predict_hidden(model: Any, batch: PackedBatch, *, packing: Packing) -> Tensor:
    """Hidden states behind the final norm at `batch.predict_index`.

    Args:
        model: a causal model from `load_policy`.
        batch: on the model's device; for `packed`, made with `share_prompts=False`.
        packing: `shared_prefix` and `packed` run the row as it is, under the shared-prefix
            attention; `padded` runs one right-padded sequence a response under the model's own.

    Returns:
        (N, D), in the model's compute dtype.

    Raises:
        ValueError: an unknown packing.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {packing!r}")
    if packing == "padded":
        return padded_hidden(model, batch)
    # A mask of four dimensions is passed through by transformers: no (T, T) mask is ever built.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    output = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=unused_mask,
        use_cache=False,
        fastalign_plan=AttentionPlan(batch),
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden.index_select(0, batch.predict_index)


def padded_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """The same rows by an ordinary forward of right-padded sequences, (R, L)."""
    layout = batch.layout
    sequences = []
    for (start, stop), prompt in zip(layout.response_bounds, layout.response_prompt, strict=True):
        first, last = layout.prompt_bounds[prompt]
        sequences.append([*range(first, last), *range(start, stop)])
    longest = max(len(sequence) for sequence in sequences)
    index = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
    device = batch.input_ids.device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    input_ids = batch.input_ids[torch.tensor(index, device=device)] * mask
    output = model.base_model(
        input_ids=input_ids, attention_mask=mask.to(torch.int64), use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    row = torch.repeat_interleave(
        torch.arange(len(sequences), device=device),
        batch.target_bounds.diff(),
        output_size=batch.num_targets,
    )
    column = batch.position_ids[batch.predict_index]
    return hidden.flatten(0, 1).index_select(0, row * longest + column)
