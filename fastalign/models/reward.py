"""Reward models: transformers' sequence classifiers with one label, `score` without bias.

The score of a response is read at its last token by position. transformers' own forward finds
that token as the last one that is not `config.pad_token_id`, so a saved model needs a pad token
that no response ends with (`set_pad_token`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from fastalign.batch.packed import PackedBatch
from fastalign.compute import ON_CPU, Compute
from fastalign.models import attention
from fastalign.models.load import (
    PACKABLE,
    check_finite,
    check_packable,
    disable_dropout,
    is_out_of_memory,
    read_config,
    unreadable_weights,
)
from fastalign.models.lora_files import adapter_base
from fastalign.models.packed import hidden_at
from fastalign.ranks.whole_weights import whole_state

HEAD = "score.weight"


def is_reward_model(config: Any) -> bool:
    """Whether the folder of this configuration has a classifier's head already.

    Raises:
        ValueError: it has a head that is no reward model's.
    """
    (name,) = (config.architectures or [config.model_type])[:1]
    if config.model_type not in PACKABLE:
        raise ValueError(
            f"model.path: expected a reward model or a causal model of type "
            f"{', '.join(PACKABLE)}, got {name} of type {config.model_type!r}"
        )
    if not name.endswith("Classification"):
        return False
    if not name.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"model.path: expected a sequence classifier with num_labels 1, got {name} with "
            f"num_labels {config.num_labels}"
        )
    return True


def load_reward_model(
    path: str | Path,
    compute: Compute = ON_CPU,
    *,
    seed: int = 0,
    fresh_head: bool = True,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """Load a reward model: a saved one with its head, or a causal model under a fresh one.

    A fresh head is drawn from N(0, 1 / (D + 1)), as in Stiennon et al. (arXiv 2009.01325).

    Args:
        path: folder in transformers' layout, or a hub name.
        compute: as for `load_policy`.
        seed: random seed of a fresh head.
        fresh_head: False: a saved head is required, as for scoring.
        dtype: dtype of the parameters.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if there is no model, it is of another kind, or weights are missing.
    """
    attention.register()
    if adapter_base(path) is not None:
        raise ValueError(f"model.path: {path} is an adapter; merge it first (fastalign merge)")
    config = read_config(path, trust_remote_code=trust_remote_code)
    has_head = is_reward_model(config)
    if not has_head and not fresh_head:
        raise ValueError(
            f"model.path: expected a trained reward model, got {config.architectures or 'none'} in "
            f"{str(path)!r}; fastalign reward trains one"
        )
    if compute.packing != "padded":
        check_packable(config)
    try:
        with without_load_report():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=attention.implementation_for(config, compute, dtype),
                output_loading_info=True,
            )
    except (OSError, RuntimeError, UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise unreadable_weights(path, error) from error
    # Nothing is left to chance: what transformers would initialise at random is named instead.
    missing = set(found["missing_keys"]) - (set() if has_head else {HEAD})
    foreign = {name for name in found["unexpected_keys"] if name.startswith("score")}
    if missing or foreign:
        what = f"has no {min(missing)}" if missing else f"has a {min(foreign)}"
        raise ValueError(f"model.path: {str(path)!r} {what}: no {type(model).__name__} of ours")
    if not has_head:
        draw_head(model.score, seed)
    model.get_input_embeddings().padding_idx = None  # every token's embedding is trained
    model = model.to(compute.device)
    check_finite(model, path)
    disable_dropout(model)
    return model.eval()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps transformers from warning that a head is new, which is what was asked for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def draw_head(score: nn.Linear, seed: int) -> None:
    """Fills (1, D) from its own generator, whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    std = (score.in_features + 1) ** -0.5
    values = torch.randn(score.weight.shape, generator=generator) * std
    score.weight.copy_(values)


@torch.no_grad()
def set_pad_token(model: Any, pad_token_id: int) -> None:
    """Names the token that transformers' forward takes for padding; a new one gets a row."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    if pad_token_id >= num_rows:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        model.get_input_embeddings().weight[num_rows:] = 0  # masked wherever it stands
    model.config.pad_token_id = pad_token_id


def response_reward(model: Any, batch: PackedBatch, compute: Compute) -> Tensor:
    """Return the score (R,) at each response's last token; see `score_at`."""
    return score_at(model, batch, batch.response_bounds[:, 1] - 1, compute)


def score_at(
    model: Any,
    batch: PackedBatch,
    positions: Tensor,
    compute: Compute,
    plan: attention.AttentionPlan | None = None,
) -> Tensor:
    """Return the score at K positions of the packed row: rewards or values.

    Args:
        model: from `load_reward_model`.
        batch: batch on the model's device.
        positions: (K,) int64.
        compute: packing and dtype.
        plan: see `hidden_at`.

    Returns:
        (K,) float32 (float64 for a float64 model), under autocast too.
    """
    hidden = hidden_at(model, batch, positions, compute, plan)
    weight = model.score.weight[0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.mv(hidden.to(wide), weight.to(wide))


def save_reward_model(
    model: Any, tokenizer: Any, folder: str | Path, *, leave_out: tuple[str, ...] = ()
) -> None:
    """Writes what `AutoModelForSequenceClassification` opens, and the tokenizer beside it.

    Of a model that ranks share, all call this, and rank 0 writes.

    Args:
        model: a reward model whose pad token is set.
        tokenizer: with the same pad token.
        folder: where to.
        leave_out: parameters that are not the classifier's own.
    """
    assert model.config.pad_token_id == tokenizer.pad_token_id, "the served score depends on it"
    state = whole_state(model)
    if state is None:
        return
    weights = {k: v for k, v in state.items() if k not in leave_out}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
