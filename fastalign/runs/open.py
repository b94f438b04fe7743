"""Open a run: join the ranks, resolve the device, prepare and lock the run's folder.

An error of memory in the run becomes one line with the settings that need less.
"""

import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastalign.compute import Compute, find_device, is_out_of_memory
from fastalign.data.tokenizer import Tokenizer, template_clock
from fastalign.in_memory import (
    Objects,
    as_model,
    as_rewards,
    as_rows,
    is_given,
    names_object,
)
from fastalign.models.model_in_memory import ready_for_use
from fastalign.output import lossy_output, quiet_libraries, refuse_secret_settings
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.failure import record_collectives, watched_by_ranks
from fastalign.ranks.parallel import part_from_ranks
from fastalign.ranks.world import ALONE, World, open_world, world_of_environment
from fastalign.report.trackers import check_trackers
from fastalign.runs.accumulate import Total
from fastalign.runs.best import RunResult, check_best_metric
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
from fastalign.runs.loop import STEP, Run, Step
from fastalign.runs.metrics import Metrics
from fastalign.runs.state import TrainState, adamw, seed_everything

Config = TypeVar("Config", bound=TrainingConfig)
RUNS = Path("runs")  # where a run has its folder if none is named


class OpenRun:
    """A run that has begun, with what it trains; `fastalign.dpo_run` and its like open it.

        with fastalign.dpo_run(model=model, train_data=rows) as run:
            for step in run.steps():
                total = run.gradient(step.indices)
                step.finish(run.optimise(total))
                if step.evaluates:
                    step.log(run.evaluate())
        result = run.result

    The loop is that of `fastalign.train_dpo`; whatever stands in it takes place between two steps.
    Under `torchrun` every rank takes it.

    Args:
        run: the run.
        model: the policy or the reward model.
        tokenizer: its tokenizer.

    Attributes:
        result: the end of the run, once the loop is left or `end` was called.
    """

    result: RunResult | None = None

    def __init__(self, run: Run, model: Any, tokenizer: Tokenizer) -> None:
        self._run, self.model, self.tokenizer = run, model, tokenizer

    @property
    def compute(self) -> Compute:
        """Device, dtype, packing and ranks of the forwards."""
        return self._run.compute

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._run.folder

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self._run.num_steps

    @property
    def state(self) -> TrainState:
        """Model, optimiser and counters, which a checkpoint holds."""
        return self._run.state

    def steps(self) -> Iterator[Step]:
        """Yield each step that is to be taken; log it and save it when the next one is asked for.

        A step has a `number` (from 1), the `indices` of its examples, and `evaluates`: whether
        held-out data are due behind it. The loop calls `step.finish` with its metrics, and may add
        to them by `step.log`.

        Raises:
            ValueError: if three steps in a row were skipped, or a step was not finished.
            OSError: if the last checkpoint, or lines of `metrics.jsonl`, could not be written.
        """
        return self._run.steps()

    def optimise(self, total: Total) -> Metrics:
        """Apply the gradient that was added up; return the step's metrics, for `step.finish`.

        It changes no weight if it or the loss is not finite: `skipped` is then 1.
        """
        return self._run.optimise(total)

    def stop(self, reason: str) -> None:
        """Save and end the run after this step."""
        self._run.stop(reason)

    def end(self) -> RunResult:
        """Write the models, if the last step is taken; return the result.

        It is called when the context is left without an error, if not before.
        """
        if self.result is None:
            self.result = replace(
                self._finish(), model=ready_for_use(self.model), tokenizer=self.tokenizer
            )
        return self.result

    def _finish(self) -> RunResult:
        """Write what a run of this algorithm writes at its end."""
        return self._run.end(self.model, self.tokenizer)


def with_objects(kind: type[Config], config: Config | None, title: str, given: Objects) -> Config:
    """Return the settings of a run, with the objects and paths that a caller gave beside them.

    Args:
        kind: class of the settings.
        config: the settings; None: the defaults. What they name already is not given again.
        title: name of the algorithm, for a folder of its own (`runs/dpo-1`) if none is named.
        given: the objects and paths.

    Raises:
        ValueError: if something is given twice, or not at all, or is of a wrong type.
    """
    config = kind() if config is None else config  # type: ignore[call-arg]
    if not isinstance(config, kind):
        got = type(config).__name__
        raise ValueError(f"config: expected a {kind.__name__}, got {got}")
    found: dict[str, Any] = {}
    model = config.model.path
    check_given_once("model", given.model, "model.path", model)
    if given.model is not None or given.tokenizer is not None:
        model = as_model("model", model if given.model is None else given.model, given.tokenizer)
        found["model"] = replace(config.model, path=model)
    for name, setting in (("train_data", "train"), ("eval_data", "eval")):
        rows, before = getattr(given, name), getattr(config.data, setting)
        check_given_once(name, rows, f"data.{setting}", before)
        if rows is not None:
            data = found.get("data", config.data)
            found["data"] = replace(data, **{setting: as_rows(name, rows)})
    section: Any
    for name in ("reference", "teacher"):
        other, section = getattr(given, name), getattr(config, name, None)
        if other is not None:
            check_given_once(name, other, f"{name}.path", section.path)
            # An object has the policy's tokens; a path names a tokenizer, which is compared.
            named = isinstance(other, str | os.PathLike)
            found[name] = replace(section, path=as_model(name, other, None if named else model))
    section = getattr(config, "reward", None)
    if given.reward is not None:
        check_given_once("reward", given.reward, "reward.sources", section.sources)
        found["reward"] = replace(section, sources=as_rewards(given.reward))
    config = replace(config, **found) if found else config
    check_all_given(config)
    if not is_given(config.run.dir):
        config = replace(config, run=replace(config.run, dir=new_folder(title, config)))
    return config


def check_all_given(config: Any) -> None:
    """Raise ValueError for what a run has no default for, or an object of another program."""
    values = [("model", config.model.path), ("train_data", config.data.train)]
    values += [("eval_data", config.data.eval)]
    for name, setting in (("reference", "path"), ("teacher", "path"), ("reward", "sources")):
        found = getattr(getattr(config, name, None), setting, None)
        values += [(name, value) for value in (found if isinstance(found, tuple) else (found,))]
    for name, value in values:
        if value is not None and not is_given(value):
            raise ValueError(f"{name}: expected an object or a path, got none")
        if names_object(value):
            raise ValueError(
                f"{name}: expected the object that the run was given in Python, to go on with it "
                f"there, or a path; got {value!r}"
            )


def check_given_once(name: str, value: Any, setting: str, before: Any) -> None:
    """Raise ValueError if an argument and a setting name the same thing."""
    if value is not None and before is not None and is_given(before):
        raise ValueError(f"{name}: expected it as an argument or as {setting}, got both")


def new_folder(title: str, config: TrainingConfig) -> str:
    """Make a folder for a run that has none, the first of `runs/dpo-1`, `runs/dpo-2`, ...

    Raises:
        ValueError: if the run is to be resumed, or has several ranks.
    """
    if config.run.resume:
        raise ValueError("run.dir: expected the folder of the run that is resumed, got none")
    if (size := world_of_environment().size) > 1:
        raise ValueError(f"run.dir: expected a folder for all {size} ranks, got none")
    for number in itertools.count(1):
        folder = RUNS / f"{title}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    print(f"run folder: {folder}")
    return str(folder)


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
    quiet_libraries()
    check_numbers(config)
    values = config_to_dict(config)
    refuse_secret_settings(values)
    adamw(config.optim.states)  # a missing library is reported before hours of work
    check_sharing(config)
    if config.train.best_metric is not None:
        check_best_metric(config)
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
        world.first_does(lambda: check_trackers(config.track.to))
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
