"""Memory: what this process uses, and an error of memory in one line: where, and what helps."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastalign.compute import is_out_of_memory
from fastalign.runs.checkpoint.files import CHECKPOINTS, list_checkpoints
from fastalign.runs.config import TrainingConfig
from fastalign.runs.folder import has_steps, never_saved

# How the notes on an optimiser step, and on a model that is read, begin.
STEP = "step "
LOADING = "loading "


def resident_bytes() -> int:
    """Return this process's resident memory on Linux, 0 elsewhere."""
    table = Path("/proc/self/statm")
    if not table.exists():
        return 0
    return int(table.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: PyTorch's on a GPU, otherwise the process's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def memory_used_in(what: str) -> Iterator[None]:
    """Add a note of what was being done to an error of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(what)
        raise


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
