"""A run's data: loaded under its rules, with no row longer than the model's positions."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastalign.data import (
    TokenizedDataset,
    Tokenizer,
    added_tokens_line,
    load_preferences,
    load_sft,
)
from fastalign.models import has_adapter
from fastalign.runs.config import PreferenceDataConfig


def check_lengths(model: Any, data: TokenizedDataset) -> None:
    """Print what was left out; raise if a row has more tokens than the model has positions.

    Raises:
        ValueError: if a row is too long, see `check_positions`.
    """
    for line in data.report.log_lines():
        print(line, flush=True)
    check_positions(model, data)


def check_positions(model: Any, data: TokenizedDataset) -> None:
    """Check that no row has more tokens than the model has positions.

    Raises:
        ValueError: if a row is too long; it names the first.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for group, source in zip(data.groups, data.sources, strict=True):
        longest = len(group.prompt_ids) + max(len(ids) for ids in group.response_ids)
        if longest > limit:
            raise ValueError(
                f"{source}: {longest} tokens, but the model has {limit} positions; "
                f"lower --data.max-length to at most {limit}"
            )


def say_added_tokens(tokenizer: Tokenizer, rows: Iterable[Sequence[int]]) -> None:
    """Print which added tokens an adapter's training data have, whose embeddings are frozen."""
    line = added_tokens_line(tokenizer, rows)
    if line is not None:
        print(line, flush=True)


def load_data(
    config: Any, source: str, tokenizer: Tokenizer, *, keep_ties: bool = False
) -> TokenizedDataset:
    """Load demonstrations or pairs under the run's rules; a loss with ties keeps ties."""
    data = config.data
    if isinstance(data, PreferenceDataConfig):
        return load_preferences(
            source,
            tokenizer,
            max_length=data.max_length,
            on_bad_row=data.on_bad_row,
            on_too_long=data.on_too_long,
            ties="keep" if keep_ties or config.loss.uses_ties else data.ties,
        )
    return load_sft(
        source,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        on_too_long=data.on_too_long,
    )


def load_sets(
    config: Any, model: Any, tokenizer: Tokenizer
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Load the training data, and the held-out data if there are any.

    Raises:
        ValueError: if a source is at fault, naming file and row, or a row is too long.
        FileNotFoundError: if a file does not exist.
    """
    sources = [config.data.train, *([] if config.data.eval is None else [config.data.eval])]
    sets = [load_data(config, source, tokenizer) for source in sources]
    for data in sets:
        check_lengths(model, data)
    if has_adapter(model):
        say_added_tokens(
            tokenizer, (ids for g in sets[0].groups for ids in (g.prompt_ids, *g.response_ids))
        )
    return sets[0], sets[1] if len(sets) > 1 else None
