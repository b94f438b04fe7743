"""How every algorithm begins: ranks, run folder, data, and whether they fit the model."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from fastalign.data import (
    TokenizedDataset,
    Tokenizer,
    load_preferences,
    load_sft,
)
from fastalign.models import (
    part_from_ranks,
)
from fastalign.trainers.any_config import AnyConfig, config_to_dict
from fastalign.trainers.compute import Compute, make_compute
from fastalign.trainers.config import DPOConfig, RewardConfig, SFTConfig
from fastalign.trainers.heartbeat import watched_by_ranks
from fastalign.trainers.optimizer import adamw
from fastalign.trainers.process_memory import out_of_memory_in_one_line
from fastalign.trainers.run_folder import announce, locked, prepare_run_folder
from fastalign.trainers.sharing import check_sharing
from fastalign.trainers.state import seed_everything
from fastalign.world import open_world, world_of_environment

# What trains on rows that are there before the run, responses and all.
OnRows = SFTConfig | DPOConfig | RewardConfig


@contextmanager
def opened_run(config: AnyConfig) -> Iterator[Compute]:
    """Joins the ranks; prepares and holds the run's folder; prints the settings; seeds everything.

    Rank 0 speaks for all: the others print nothing.

    Raises:
        ValueError: the folder holds another run, or is in use; a library is missing; memory did
            not suffice; settings that do not go together; the ranks do not meet.
    """
    adamw(config.optim.states)  # what is not installed is said before hours of work
    check_sharing(config)
    world = world_of_environment()
    compute = make_compute(config.train, world, config.parallel)
    values = config_to_dict(config)
    folder = Path(config.run.dir)
    with ExitStack() as stack:
        stack.enter_context(
            open_world(
                world,
                timeout_seconds=config.parallel.timeout_seconds,
                always=config.parallel.strategy == "fsdp",
            )
        )
        stack.enter_context(watched_by_ranks(world, config.parallel))
        if not world.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        world.first_does(lambda: prepare_run_folder(folder, values, resume=config.run.resume))
        world.first_does(lambda: stack.enter_context(locked(folder)))
        stack.enter_context(out_of_memory_in_one_line(config))
        announce(values)
        seed_everything(config.run.seed)
        yield compute
        part_from_ranks()


def check_lengths(model: Any, data: TokenizedDataset) -> None:
    """Refuses data longer than the model's positions; says what was left out of the data.

    Raises:
        ValueError: see `check_positions`.
    """
    line = data.report.losses_line()
    if line is not None:
        print(line, flush=True)
    for fault in data.report.faults[:5]:
        print(f"skipped: {fault}", flush=True)
    check_positions(model, data)


def check_positions(model: Any, data: TokenizedDataset) -> None:
    """Refuses data longer than the model's positions.

    Raises:
        ValueError: naming the first row that is too long.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for group, source in zip(data.groups, data.sources, strict=True):
        longest = len(group.prompt_ids) + max(len(ids) for ids in group.response_ids)
        if longest > limit:
            raise ValueError(
                f"{source}: {longest} tokens, but the model has {limit} positions; lower "
                "--data.max-length and say what to do with such rows (--data.on-too-long)"
            )


def load_data(
    config: OnRows, source: str, tokenizer: Tokenizer, *, keep_ties: bool = False
) -> TokenizedDataset:
    """A source under the run's rules: demonstrations, or pairs; a loss with ties keeps them."""
    data = config.data
    if isinstance(config, SFTConfig):
        return load_sft(
            source,
            tokenizer,
            max_length=data.max_length,
            on_bad_row=data.on_bad_row,
            on_too_long=data.on_too_long,
        )
    return load_preferences(
        source,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        on_too_long=data.on_too_long,
        ties="keep" if keep_ties or config.loss.uses_ties else config.data.ties,
    )


def load_sets(
    config: OnRows, model: Any, tokenizer: Tokenizer
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training data, and held-out data if there are any, none longer than the model's positions.

    Raises:
        ValueError: whatever is wrong with a source, naming file and row.
        FileNotFoundError: a file that is not there.
    """
    sources = [config.data.train, *([] if config.data.eval is None else [config.data.eval])]
    sets = [load_data(config, source, tokenizer) for source in sources]
    for data in sets:
        check_lengths(model, data)
    return sets[0], sets[1] if len(sets) > 1 else None
