"""The loop of a run: one step at a time, logged, evaluated and saved; it ends when it is asked to.

A trainer opens a run, begins it with what it trains, and takes its steps:

    with open_run(config, "dpo") as run:
        policy, tokenizer = ...
        run.begin(policy, data)              # optimiser, resume, writers
        for step in run.steps():             # to the last step, a signal, or too many skipped ones
            total = ...                      # adds the gradient of step.indices
            step.finish(run.optimise(total))
            if step.evaluates:
                step.log(...)                # metrics on held-out data
        return run.end(policy, tokenizer)    # writes the models
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fastalign.batch.schedule import indices_of_step
from fastalign.compute import Compute
from fastalign.models import has_adapter, model_fingerprint, save_model
from fastalign.rollouts import OverlappedSampler, RankZeroSampler, SamplerFailed
from fastalign.runs.accumulate import Total
from fastalign.runs.checkpoint.files import CHECKPOINTS
from fastalign.runs.checkpoint.restore import resume
from fastalign.runs.checkpoint.writer import CheckpointWriter
from fastalign.runs.config import AnyConfig, DataConfig
from fastalign.runs.final_model import save_final_model
from fastalign.runs.memory import STEP, memory_used_in, peak_memory_bytes
from fastalign.runs.metrics import Metrics, ProgressDisplay, metrics_writer
from fastalign.runs.observe import StallWatch, stop_on_signal, traced
from fastalign.runs.state import TrainState, make_optimizer, optimiser_step

MAX_SKIPPED_IN_A_ROW = 3
SKIPPED = "a non-finite loss or gradient, or a spike (optim.skip_sigma)"
COLLAPSED = 3  # exit code of a run that its own algorithm ended early
GO_ON = "go on with --run.resume"

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """The end of a run.

    Attributes:
        step: optimiser steps taken.
        finished: whether all steps are done and `model/` (or `adapter/`) is written.
        exit_code: 0 finished or SIGTERM, 130 after SIGINT, 3 if the algorithm's own check stopped
            the run.
        metrics: metrics of the last step.
    """

    step: int
    finished: bool
    exit_code: int
    metrics: Metrics


class Run:
    """A run: settings, folder, optimiser, checkpoints and metrics of what a trainer trains.

    `open_run` makes it. Every rank has one and calls its methods in the same order; rank 0 writes.

    Args:
        config: the run's settings.
        title: name of the algorithm, in front of the progress bar.
        compute: device, dtype, packing and ranks of the forwards.

    Attributes:
        state: model, optimiser and counters, once the run has begun.
        num_steps: optimiser steps of the whole run, once it has begun.
    """

    state: TrainState
    num_steps: int

    def __init__(self, config: AnyConfig, title: str, compute: Compute) -> None:
        self.config, self.title, self.compute = config, title, compute
        self.world, self.folder = compute.world, Path(config.run.dir)
        self._resources = ExitStack()  # closed when the run is left
        self._loop = ExitStack()  # closed behind the last step
        self._step: Step | None = None
        self._reason: str | None = None
        self._stopped = False
        self._metrics: Metrics = {}

    def enter_context(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that is left at the run's end, after the last checkpoint."""
        return self._resources.enter_context(manager)

    def begin(
        self,
        model: Any,
        data: Any,
        *,
        policy: Any = None,
        reference_fingerprint: str | None = None,
        overlapped: OverlappedSampler | RankZeroSampler | None = None,
    ) -> None:
        """Make the optimiser, restore a checkpoint if the run resumes, and open the writers.

        Args:
            model: the module whose parameters are trained.
            data: training examples, with a length and a `fingerprint`.
            policy: the part of `model` that is saved as `model/`; default: all of it.
            reference_fingerprint: fingerprint of a frozen reference, which a checkpoint does not
                hold and a resumed run must find again.
            overlapped: a sampler that works on the next step's completions, which a checkpoint
                waits for and holds.

        Raises:
            ValueError: if there is no checkpoint to resume from, or it is another run's.
        """
        config, folder, world = self.config, self.folder, self.world
        self.state = state = TrainState(model, make_optimizer(model, config.optim))
        self.num_steps = total_steps(config, len(data))
        self._num_examples, self._overlapped = len(data), overlapped
        line = small_data_line(config, len(data))
        if line is not None:
            print(line, flush=True)
        policy = model if policy is None else policy
        self._sources = {
            "data_fingerprint": data.fingerprint,
            "base_fingerprint": model_fingerprint(policy) if has_adapter(policy) else None,
            "reference_fingerprint": reference_fingerprint,
        }
        num_bytes = resume(config.run, state, self._sources, world) if config.run.resume else 0
        if config.run.export is not None:
            self._stopped = True
            return
        loop = self._loop
        self._watch = StallWatch(folder, config.train.stall_seconds, world)
        loop.callback(self._watch.close)
        self._writer = metrics_writer(folder, world, num_bytes=num_bytes, step=state.step)
        loop.callback(self._writer.close)
        self._checkpoints = CheckpointWriter(
            folder / CHECKPOINTS,
            config.train.keep_checkpoints,
            world,
            background=config.train.async_checkpoints,
            timeout_seconds=config.parallel.timeout_seconds,
        )
        loop.callback(self._checkpoints.close)
        self._signals = loop.enter_context(stop_on_signal())
        self._display = loop.enter_context(ProgressDisplay(self.title, self.num_steps, state.step))

    def steps(self) -> Iterator["Step"]:
        """Yield each step that is to be taken; log it and save it when the next one is asked for.

        Raises:
            ValueError: if three steps in a row were skipped; the run is saved.
            OSError: if a checkpoint could not be written.
        """
        while self.state.step < self.num_steps and not self._stopped:
            self._step = step = Step(self)
            yield step
            self._close_step(last=False)
            if not self._stopped and self.state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise ValueError(
                    f"stopped at step {self.state.step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had "
                    f"{SKIPPED}; no weight was changed by them; saved, {GO_ON}"
                )
        self._loop.close()

    def optimise(self, total: Total) -> Metrics:
        """Apply the gradient that was added up; return the step's metrics.

        The gradient changes no weight if it or the loss is not finite, or if it is a spike
        (`optim.skip_sigma`): `skipped` is then 1.
        """
        assert self._step is not None
        computed = time.perf_counter()
        update = optimiser_step(self.state, total.loss, self.config.optim, self.num_steps)
        return {
            **total.metrics(),
            **update,
            "time/gradient_seconds": computed - self._step.start,
            "time/optimizer_seconds": time.perf_counter() - computed,
            "num_packed_tokens": total.num_tokens,
        }

    def stop(self, reason: str | None) -> None:
        """End the run after this step for the algorithm's own reason, unless it is None."""
        self._reason = reason

    def end(
        self,
        policy: Any,
        tokenizer: Any,
        *,
        save_model: Callable[[Any, Any, Path], None] = save_model,
        other_folders: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> RunResult:
        """Write the models, if the last step is taken or `run.export` is set; return the result.

        Args:
            policy: the model that becomes `model/` (with an adapter also `adapter/`).
            tokenizer: the tokenizer that is saved with it.
            save_model: writes (model, tokenizer, folder) in transformers' layout.
            other_folders: name of each further folder to the function that writes it.
        """
        if self._step is not None:  # the trainer left its loop early
            self._close_step(last=True)
            self._loop.close()
        step, export = self.state.step, self.config.run.export
        finished = export is None and step >= self.num_steps
        if finished or export is not None:
            folder = self.folder if export is None else Path(export)
            self.world.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
            save_final_model(
                self.config, self.world, folder, policy, tokenizer, save_model, other_folders or {}
            )
        if export is not None:
            return RunResult(step, finished=False, exit_code=0, metrics={})
        if finished:
            return RunResult(step, True, self._signals.exit_code, self._metrics)
        why = "" if self._reason is None else f" ({self._reason})"
        print(f"stopped at step {step}{why}; saved; {GO_ON}", flush=True)
        code = self._signals.exit_code if self._reason is None else COLLAPSED
        return RunResult(step, False, code, self._metrics)

    def __enter__(self) -> "Run":
        """Return the run."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what is open; save the run first if its sampler failed for good.

        Raises:
            SamplerFailed: if the sampler failed; the message says which step is saved.
        """
        step, failed = self._step, None
        stack = ExitStack()
        stack.push(self._resources)
        stack.push(self._loop)
        if step is not None:
            stack.push(step.end)
        try:
            if isinstance(error, SamplerFailed) and step is not None:
                # Either the step has changed no weight yet, or it is over and in its evaluation.
                if step.finished:
                    self._record(step, last=True)
                else:
                    self._save(last=True)
                failed = SamplerFailed(f"{error}; step {self.state.step} is saved, {GO_ON}")
        finally:
            stack.__exit__(kind, error, trace)
        if failed is not None:
            raise failed from error

    def _close_step(self, *, last: bool) -> None:
        """End the present step and record it."""
        assert self._step is not None
        self._step.end(None, None, None)
        self._record(self._step, last=last)
        self._step = None

    def _record(self, step: "Step", *, last: bool = False) -> None:
        """Log a step, and save it where a checkpoint is due or the run ends behind it."""
        assert step.finished, "the trainer did not finish the step"
        train, state = self.config.train, self.state
        metrics = self._metrics = self._agreed(step.metrics)
        self._writer.write(metrics)
        self._display.update(metrics)
        if metrics["skipped"]:
            self._display.say(skipped_line(metrics))
        self._checkpoints.check()
        self._stopped = (
            self._signals.agreed is not None
            or state.step == train.stop_at_step
            or self._reason is not None
        )
        given_up = state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
        last = last or self._stopped or given_up or state.step == self.num_steps
        if last or (train.save_every and state.step % train.save_every == 0):
            self._save(last=last)

    def _agreed(self, metrics: Metrics) -> Metrics:
        """Agree on a signal that any rank received; return rank 0's times and the most memory."""
        ranks = self.world.gather((self._signals.received, metrics))
        self._signals.agreed = next((signal for signal, _ in ranks if signal is not None), None)
        most = max(of_rank["peak_memory_bytes"] for _, of_rank in ranks)
        return {**ranks[0][1], "peak_memory_bytes": most}

    def _save(self, *, last: bool) -> None:
        """Begin a checkpoint; the last one is on the disk when this returns."""
        if self._overlapped is not None:
            self.state.rollouts = self._overlapped.state()
        extra = {"metrics_bytes": self._writer.num_bytes(), **self._sources}
        self._checkpoints.save(self.state, extra, wait=last)


class Step:
    """A step of a run, from the moment that it begins until the next one is asked for.

    Args:
        run: the run, which has begun.

    Attributes:
        number: the step's number, from 1.
        indices: examples of the training data that it is taken on.
        evaluates: whether an evaluation on held-out data is due behind it.
        start: when it began, by `time.perf_counter`.
        metrics: metrics of the step that are logged, once it is finished.
    """

    def __init__(self, run: Run) -> None:
        config, state = run.config, run.state
        self.start = time.perf_counter()
        self._run, self.number = run, state.step + 1
        every = config.train.eval_every
        self.evaluates = self.number == run.num_steps or bool(every and self.number % every == 0)
        size = examples_per_step(config, run._num_examples)
        self.indices = indices_of_step(run._num_examples, size, state.step, seed=config.run.seed)
        self.metrics: Metrics = {}
        self.finished = False
        self._whole, self._computing = ExitStack(), ExitStack()
        self._whole.enter_context(run._watch.step(self.number))
        self._computing.enter_context(memory_used_in(f"{STEP}{self.number}"))
        profiled = self.number == config.train.profile
        self._computing.enter_context(
            traced(run.folder, wanted=profiled, step=self.number, world=run.world)
        )

    def finish(self, metrics: Metrics) -> None:
        """Count the step, whose updates are done.

        Args:
            metrics: `loss`, `skipped`, `num_micro_batches`, `num_packed_tokens` (tokens of all its
                micro-batches) and whatever else is to be logged.
        """
        self._computing.close()
        run, state = self._run, self._run.state
        num_tokens = int(metrics["num_packed_tokens"])
        metrics = {name: value for name, value in metrics.items() if name != "num_packed_tokens"}
        state.step += 1
        state.num_tokens += num_tokens
        state.num_skipped_in_a_row = state.num_skipped_in_a_row + 1 if all_skipped(metrics) else 0
        seconds = time.perf_counter() - self.start
        train = run.config.train
        room = metrics["num_micro_batches"] * train.tokens_per_batch
        self.metrics = {
            "step": state.step,
            "epoch": state.step * len(self.indices) / run._num_examples,
            **metrics,
            "num_tokens": state.num_tokens,
            "fill_rate": num_tokens / room if room else 0.0,
            "peak_memory_bytes": peak_memory_bytes(next(state.model.parameters()).device),
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
        }
        self.finished = True
        self._whole.enter_context(memory_used_in(f"the evaluation of step {self.number}"))

    def log(self, metrics: Metrics) -> None:
        """Add metrics to those of the finished step."""
        assert self.finished
        self.metrics |= metrics

    def end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the watch over the step; note on an error of memory what was being done."""
        self._whole.push(self._computing)
        self._whole.__exit__(kind, error, trace)


def total_steps(config: AnyConfig, num_examples: int) -> int:
    """Return `max_steps`, or the steps of `epochs` passes (the last one may reach beyond)."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    size = examples_per_step(config, num_examples)
    return max(1, math.ceil(config.train.epochs * num_examples / size))


def examples_per_step(config: AnyConfig, num_examples: int) -> int:
    """Return `train.batch_size`, or the number of all examples if there are fewer.

    Prompts that are sampled are taken several times instead: each time has other completions.
    """
    if isinstance(config.data, DataConfig):
        return min(config.train.batch_size, num_examples)
    return config.train.batch_size


def small_data_line(config: AnyConfig, num_examples: int) -> str | None:
    """Return the line printed for a batch larger than the data; None if it is not."""
    size = config.train.batch_size
    if size <= num_examples:
        return None
    if isinstance(config.data, DataConfig):
        done = "a step takes each example once"
    else:
        least, rest = divmod(size, num_examples)
        times = f"{least} or {least + 1}" if rest else f"{least}"
        done = f"a step samples each prompt {times} times"
    return f"{num_examples} examples, train.batch_size {size}: {done}"


def indices_of_run(config: AnyConfig, num_examples: int) -> set[int]:
    """Return the examples that the run will use."""
    used: set[int] = set()
    for step in range(total_steps(config, num_examples)):
        if len(used) == num_examples:
            break
        size = examples_per_step(config, num_examples)
        used.update(indices_of_step(num_examples, size, step, seed=config.run.seed))
    return used


def all_skipped(metrics: Metrics) -> bool:
    """Return whether a step had updates and none of them was applied."""
    return metrics["skipped"] == metrics.get("num_updates", 1) > 0


def skipped_line(metrics: Metrics) -> str:
    """Return the line printed for a step of which not every update was applied."""
    skipped, several = metrics["skipped"], metrics.get("num_updates", 1)
    of_all = "" if all_skipped(metrics) else f": {skipped} of {several} updates"
    return (
        f"step {metrics['step']}{of_all} skipped: loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; no weight was changed by it"
    )
