"""Real runs for the fault table: `fastalign ... --config FILE` in one process or on ranks."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fastalign.runs.checkpoint.restore import fault_of
from fastalign.runs.checkpoint.writer import CHECKPOINTS
from fastalign.runs.config import config_to_dict
from tests import rank_processes as ranks
from tests.faults import injected
from tests.faults.injected import Fault
from tests.faults.table import Place
from tests.small_runs import dpo_config, ppo_config, read_metrics

HEARD: list[str] = []  # what the runs of the present test said
NUM_STEPS = 8
MEASURED = ("_seconds", "tokens_per_second", "peak_memory_bytes", "eps")
MAKE = {"dpo": dpo_config, "ppo": ppo_config}
# Three micro-batches of a step on each rank; a checkpoint of every step.
EXAMPLES_OF_A_RANK = 3
TRAIN = {
    "batch_size": EXAMPLES_OF_A_RANK,
    "tokens_per_batch": 16,
    "save_every": 1,
    "keep_checkpoints": 99,
}


@dataclass(frozen=True)
class Outcome:
    """How a run's processes ended.

    Attributes:
        codes: exit codes, by rank.
        outputs: what each said.
        folder: of the run.
    """

    codes: list[int | None]
    outputs: list[str]
    folder: Path

    def checkpoint(self, step: int) -> dict[str, Tensor]:
        """Weights and optimiser states, ranks' parts of one numbered in their order."""
        folder = self.folder / CHECKPOINTS / f"step-{step:06d}"
        assert fault_of(folder) is None
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(path).items():
                part = sum(key.startswith(f"{name}, part ") for key in found)
                if not name.startswith("random."):
                    found[f"{name}, part {part}"] = value
        return found

    def state(self, step: int) -> dict[str, Any]:
        text = (self.folder / CHECKPOINTS / f"step-{step:06d}/state.json").read_text()
        return dict(json.loads(text))

    def moved(self, step: int) -> bool:
        """Whether a step changed any weight or any of the optimiser's states."""
        return not same(self.checkpoint(step - 1), self.checkpoint(step))

    def skipped(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.folder) if row["skipped"]]


class Stage:
    """A folder with a model and data, and runs in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for trainer, make in MAKE.items():
            config = make(folder, "unnamed", **TRAIN)
            if trainer == "ppo":
                config = replace(config, train=replace(config.train, batch_size=4, max_steps=4))
            self.write_config(trainer, config_to_dict(config))

    def write_config(self, name: str, values: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def command(self, place: Place, run: str, *flags: str, trainer: str = "dpo") -> list[str]:
        """The arguments of `fastalign` for a run."""
        size = str(EXAMPLES_OF_A_RANK * place.num_ranks)
        return [
            *(trainer, "--config", str(self.folder / f"{trainer}.yaml")),
            *("--run.dir", str(self.folder / run), "--parallel.strategy", place.strategy),
            *(("--train.batch-size", size) if trainer == "dpo" else ()),
            *flags,
        ]

    def start(
        self,
        place: Place,
        run: str,
        *flags: str,
        faults: Sequence[Fault] = (),
        trainer: str = "dpo",
        logs: str | None = None,
        first_holds_store: bool = False,
    ) -> ranks.Ranks:
        """Starts a run; `logs` names what it prints, where another run has the same folder."""
        arguments = self.command(place, run, *flags, trainer=trainer)
        place_of_logs = self.folder / "logs" / (logs or run)
        place_of_logs.parent.mkdir(exist_ok=True)
        return ranks.start(
            place.num_ranks,
            place_of_logs,
            injected.run,
            *(faults, place.num_ranks == 1, arguments),
            first_holds_store=first_holds_store,
        )

    def end(
        self, run: str, started: ranks.Ranks, *, stopped: int | None = None, traces: bool = False
    ) -> Outcome:
        """When all have ended; a rank that is stopped is killed when the others have."""
        if stopped is not None:
            for rank, process in enumerate(started.processes):
                process.join(0 if rank == stopped else ranks.SECONDS)
            started.processes[stopped].kill()
        codes = started.join()
        outputs = [started.output(rank) for rank in range(len(codes))]
        HEARD.extend(outputs)
        assert traces == any("Traceback" in output for output in outputs), "\n".join(outputs)
        return Outcome(codes, outputs, self.folder / run)

    def run(
        self, place: Place, run: str, *flags: str, traces: bool = False, **options: Any
    ) -> Outcome:
        """A run that ends as it may; with a traceback only if that is expected."""
        return self.end(run, self.start(place, run, *flags, **options), traces=traces)

    def finish(self, place: Place, run: str, *flags: str, **options: Any) -> Outcome:
        """A run that ends well."""
        outcome = self.run(place, run, *flags, **options)
        assert outcome.codes == [0] * place.num_ranks, "\n".join(outcome.outputs)
        assert (outcome.folder / "model/model.safetensors").exists()
        return outcome

    def straight(self, place: Place, trainer: str = "dpo") -> Outcome:
        """A run without a fault, made once."""
        run = f"straight, {place}, {trainer}"
        if (self.folder / run).exists():
            return Outcome([], [], self.folder / run)
        return self.finish(place, run, trainer=trainer)

    def copy_of(self, outcome: Outcome, run: str, last: int) -> Outcome:
        """A run that was stopped at that step, as a run without a fault was once."""
        shutil.copytree(outcome.folder, self.folder / run)
        for step in range(last + 1, NUM_STEPS + 1):
            shutil.rmtree(self.folder / run / CHECKPOINTS / f"step-{step:06d}", ignore_errors=True)
        shutil.rmtree(self.folder / run / "model")
        return Outcome([], [], self.folder / run)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.endswith(MEASURED)} for row in read_metrics(folder)
    ]


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    """Two runs have the same metrics, weights, optimiser states and final model."""
    assert numbers(one.folder) == numbers(other.folder)
    last = len(numbers(one.folder))
    assert same(one.checkpoint(last), other.checkpoint(last))
    for part in one.folder.glob("*/model.safetensors"):
        assert same(load_file(part), load_file(other.folder / part.relative_to(one.folder)))


def assert_nothing_left_behind(outcome: Outcome) -> None:
    """Of half-written folders and files."""
    assert not [str(p) for p in outcome.folder.rglob(".*") if p.name != ".lock"]


def contents(outcome: Outcome) -> dict[Path, bytes]:
    """What a run may not lose; TensorBoard's files have the time in their names."""
    files = [path for path in outcome.folder.rglob("*") if path.is_file()]
    return {p: p.read_bytes() for p in files if p.name.endswith((".jsonl", ".safetensors"))}
