"""`python -m benchmarks.trl_trainers`: TRL's trainers beside those of `fastalign.trl`.

Loss and gradients of one batch, with DPO's reference in it, as the trainer's `compute_loss` gives
them: CPU time of all threads, and peak resident memory beyond that of the built trainer. Each has
a process of its own and they take turns; losses must agree. glibc's allocator is as the environment
says. Linux only.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import CLEAR_REFS, resident_bytes
from benchmarks.step_cases import (
    CASES,
    MAX_LENGTH,
    PAD,
    SHAPES,
    make_groups,
    make_tokenizer,
    write_model,
    write_rows,
)
from fastalign.batch.packed import Group

AGREEMENT = 1e-4  # |our loss - TRL's| / |TRL's|, in float32
Make = Callable[[type[Any], Path, list[Group], Any], tuple[Any, dict[str, Any]]]


def make_dpo(kind: type[Any], folder: Path, groups: list[Group], adapter: Any) -> tuple[Any, Any]:
    """Return a DPO trainer and its batch; without an adapter the reference is a second model."""
    from trl import DPOConfig

    return _on_rows(kind, DPOConfig, folder, groups, adapter, "preference")


def make_sft(kind: type[Any], folder: Path, groups: list[Group], adapter: Any) -> tuple[Any, Any]:
    """Return an SFT trainer and its batch: the chosen responses."""
    from trl import SFTConfig

    return _on_rows(kind, SFTConfig, folder, groups, adapter, "sft")


def make_grpo(kind: type[Any], folder: Path, groups: list[Group], adapter: Any) -> tuple[Any, Any]:
    """Return a GRPO trainer and a batch of given samples with given advantages: none is drawn."""
    from datasets import Dataset
    from trl import GRPOConfig

    samples = [(one.prompt_ids, ids) for one in groups for ids in one.response_ids]
    config = GRPOConfig(
        per_device_train_batch_size=len(samples), num_generations=2, **_options(folder)
    )
    trainer = kind(
        str(folder / "model"),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "w5"}] * len(samples)),
        processing_class=make_tokenizer(_vocab_size(folder)),
        peft_config=adapter,
    )
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
    prompts = _padded([prompt for prompt, _ in samples], left=True)
    completions = _padded([ids for _, ids in samples], left=False)
    batch = {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "advantages": torch.tensor([1.0, -0.5]).repeat(len(groups)),
        "num_items_in_batch": completions[1].sum(),
    }
    return trainer, batch


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    return ids, mask


def _vocab_size(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder / "model").vocab_size)


def _options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(dir=folder),
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


def _on_rows(
    kind: type[Any], config: type[Any], folder: Path, groups: list[Group], adapter: Any, rows: str
) -> tuple[Any, Any]:
    from datasets import Dataset

    given = write_rows(groups, folder / "rows.jsonl", rows)
    trainer = kind(
        str(folder / "model"),
        args=config(
            per_device_train_batch_size=len(groups), max_length=MAX_LENGTH, **_options(folder)
        ),
        train_dataset=Dataset.from_list(given),
        processing_class=make_tokenizer(_vocab_size(folder)),
        peft_config=adapter,
    )
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


TRAINERS: dict[str, tuple[str, Make]] = {
    "dpo": ("DPOTrainer", make_dpo),
    "grpo": ("GRPOTrainer", make_grpo),
    "sft": ("SFTTrainer", make_sft),
}


def serve(job: tuple[str, bool, Path, list[Group], int], connection: Connection) -> None:
    """Build one trainer; for each request send a loss, its CPU seconds and the peak so far."""
    import trl
    from peft import LoraConfig

    import fastalign.trl

    warnings.simplefilter("ignore")  # TRL and what it imports warn about themselves
    name, ours, folder, groups, rank = job
    base, make = TRAINERS[name]
    kind = getattr(fastalign.trl, f"Fused{base}") if ours else getattr(trl, base)
    adapter = LoraConfig(r=rank, target_modules="all-linear") if rank else None
    trainer, batch = make(kind, folder, groups, adapter)
    trainer.model.train()
    resident = resident_bytes("VmRSS")
    CLEAR_REFS.write_text("5", encoding="ascii")  # resets the kernel's high-water mark
    while connection.recv():
        start = time.process_time()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        seconds = time.process_time() - start
        connection.send((float(loss), seconds, resident_bytes("VmHWM") - resident))


def compare(name: str, groups: list[Group], rank: int, arguments: argparse.Namespace) -> str:
    """Return a table's row of one trainer, with or without an adapter.

    Raises:
        SystemExit: if the two losses differ.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as path:
        write_model(SHAPES[arguments.model], Path(path) / "model", 0)
        for ours in (False, True):
            mine, theirs = context.Pipe()
            job = (name, ours, Path(path), groups, rank)
            processes.append(context.Process(target=serve, args=(job, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            connections.append(mine)
        for turn in range(arguments.rounds + 1):
            found = []
            for connection in connections:
                connection.send(True)
                found.append(connection.recv())
            losses, times, peaks = zip(*found, strict=True)
            if abs(losses[1] - losses[0]) > AGREEMENT * abs(losses[0]):
                raise SystemExit(f"{name}: expected equal losses, got {losses}")
            for one, value in zip(seconds, times, strict=True):
                if turn:  # the first call warms up
                    one.append(value)
        for connection, process in zip(connections, processes, strict=True):
            connection.send(False)
            process.join()
    medians = [statistics.median(one) for one in seconds]
    spread = max((max(one) - min(one)) / statistics.median(one) for one in seconds)
    return (
        f"{name:6}{f'LoRA {rank}' if rank else 'full':12}{medians[0]:7.2f}{medians[1]:8.2f}"
        f"{medians[0] / medians[1]:8.2f}{peaks[0] / 2**20:15.0f}{peaks[1] / 2**20:6.0f}"
        f"{spread:8.0%}"
    )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_trainers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trainer", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--model", choices=list(SHAPES), default="llama-28m")
    parser.add_argument(
        "--case", choices=["long-prompts", "short-prompts", "small"], default="long-prompts"
    )
    parser.add_argument("--groups", type=int, default=4, help="pairs, or prompts with two samples")
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 16], help="LoRA's; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    groups = make_groups(case, SHAPES[arguments.model].vocab_size, arguments.groups, 2)
    print(
        f"{arguments.model}, {case.name}, {len(groups)} groups, {torch.get_num_threads()} threads"
    )
    print("               CPU s: TRL    ours   ratio  peak MiB: TRL  ours  spread")
    for name in arguments.trainer:
        for rank in arguments.rank:
            print(compare(name, groups, rank, arguments), flush=True)


if __name__ == "__main__":
    main()
