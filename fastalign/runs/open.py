"""Open a run: join the ranks, resolve the device, prepare and lock the run's folder.

An error of memory in the run becomes one line with the settings that need less.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from fastalign.compute import Compute, find_device, is_out_of_memory
from fastalign.data.tokenizer import template_clock
from fastalign.output import lossy_output, refuse_secret_settings
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.failure import record_collectives, watched_by_ranks
from fastalign.ranks.parallel import part_from_ranks
from fastalign.ranks.world import ALONE, World, open_world, world_of_environment
from fastalign.runs.checkpoint.writer import CHECKPOINTS, list_checkpoints
from fastalign.runs.config import TrainConfig, TrainingConfig, check_numbers, config_to_dict
from fastalign.runs.final_model import check_outputs
from fastalign.runs.folder import (
    begin_in_folder,
    check_run_folder,
    has_steps,
    locked,
    never_saved,
)
from fastalign.runs.inputs import LOADING, check_sharing, packing_of_run
from fastalign.runs.loop import STEP, Run
from fastalign.runs.state import adamw, seed_everything


def make_compute(
    config: TrainConfig, world: World = ALONE, parallel: ParallelConfig | None = None
) -> Compute:
    """Resolve `auto` settings; each of several ranks on a machine has a GPU of its own.

    The packing that suits the models is found by `packing_of_run`.
    """
    device = device_of_rank(config.device, world)
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return Compute(
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        packing="shared_prefix" if config.packing == "auto" else config.packing,
        attention=config.attention,
        tokens_per_batch=config.tokens_per_batch,
        max_buffer_bytes=config.max_buffer_bytes,
        world=world,
        parallel=parallel or ParallelConfig(),
    )


def device_of_rank(name: str, world: World) -> torch.device:
    """Return the device that `train.device` names for this rank.

    Raises:
        ValueError: if it is not there, or one GPU is named for several ranks.
    """
    device = find_device(name, "train.device")
    if world.size == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(
            f"train.device: expected cuda with several ranks, each has its own; got {device}"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"train.device: rank {world.rank} is number {world.local_rank} on its machine, which "
            f"has {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def open_run(config: TrainingConfig, title: str, others: Collection[str] = ()) -> Iterator[Run]:
    """Join the ranks, prepare and lock the run's folder, seed everything.

    Only rank 0 prints.

    `title` is the algorithm's name, in front of the progress bar; `others` are folders that the run
    writes at its end beside the policy's.

    Raises:
        ValueError: if a number is not finite, a setting holds a secret, the folder holds another
            run or is in use, a folder that would be written holds what this run did not make, a
            library is missing, memory did not suffice, settings contradict each other, or the ranks
            did not all come.
    """
    check_numbers(config)
    values = config_to_dict(config)
    refuse_secret_settings(values)
    adamw(config.optim.states)  # a missing library is reported before hours of work
    check_sharing(config)
    world = world_of_environment()
    compute = make_compute(config.train, world, config.parallel)
    folder = Path(config.run.dir)
    if world.size > 1:
        record_collectives(folder)
    with ExitStack() as stack:
        stack.enter_context(lossy_output())
        stack.enter_context(
            open_world(
                world,
                timeout_seconds=config.parallel.timeout_seconds,
                always=config.parallel.strategy == "fsdp",
            )
        )
        peers = stack.enter_context(watched_by_ranks(world, config.parallel))
        if not world.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        world.first_does(lambda: check_outputs(config, others))
        world.first_does(lambda: check_run_folder(folder, values, resume=config.run.resume))
        world.first_does(lambda: stack.enter_context(locked(folder)))
        began = world.first_does(lambda: begin_in_folder(folder, values, config.run))
        stack.enter_context(template_clock(began))
        stack.enter_context(out_of_memory_in_one_line(config))
        compute = replace(compute, packing=packing_of_run(config, world))
        seed_everything(config.run.seed)
        yield stack.enter_context(Run(config, title, compute, peers))
        part_from_ranks()


@contextmanager
def out_of_memory_in_one_line(config: TrainingConfig) -> Iterator[None]:
    """Turn an error of memory into one line: where it happened, and which settings to change.

    Raises:
        ValueError: if memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        notes = list(reversed(getattr(error, "__notes__", [])))
        where = f" in {', '.join(notes)}" if notes else ""
        raise ValueError(
            f"out of memory{where}; {remedies(config, notes[0] if notes else '')}; fastalign "
            f"estimate shows what takes it. {how_to_go_on(Path(config.run.dir))}"
        ) from error


def how_to_go_on(folder: Path) -> str:
    """Return the sentence that says how to continue after a setting was changed."""
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    if checkpoints:
        return f"The run goes on from {checkpoints[0].name} with the changed setting, --run.resume"
    if has_steps(folder):
        where = "" if never_saved(folder) else ", another --run.dir"
        return f"No checkpoint was saved: start again with the changed setting{where}"
    return "Nothing was trained yet: start again with the changed setting"


def remedies(config: TrainingConfig, what: str) -> str:
    """Return settings that need less memory in what was being done, with their present values.

    Outside of computations on batches, and where a model is read, it is the models that fill it.
    """
    train, strategy, lora = config.train, config.parallel.strategy, config.model.lora
    if not what or what.startswith(LOADING):
        ways = ["take a smaller model"]
        if lora.rank and lora.base == "float32":
            ways.append("hold the adapter's base in less by --model.lora.base bf16 (now float32)")
        if strategy != "fsdp":
            ways.append(f"share it among ranks by --parallel.strategy fsdp (now {strategy})")
        return ", or ".join(ways)
    buffer = train.max_buffer_bytes
    ways = [f"lower --train.tokens-per-batch (now {train.tokens_per_batch})"]
    if what.startswith(STEP) and not train.gradient_checkpointing:
        ways.append("add --train.gradient-checkpointing")
    ways.append(
        f"lower --train.max-buffer-bytes (now {'the default' if buffer is None else buffer})"
    )
    return ", or ".join(ways)
