"""The loop of a run: one step at a time, logged, evaluated and saved; it ends when it is asked to.

A trainer opens a run, begins it with what it trains, and takes its steps:

    with open_run(config, "dpo") as run:
        policy, tokenizer = ...
        run.begin(policy, data)              # optimiser, resume, writers
        for step in run.steps():             # to the last step, a signal, the end of patience
            total = ...                      # adds the gradient of step.indices
            step.finish(run.optimise(total))
            if step.evaluates:
                step.log(...)                # metrics on held-out data
        return run.end(policy, tokenizer)    # writes the models

An error between two steps, or in one before its first update, leaves a checkpoint of the last whole
step, if every rank has it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fastalign.batch.schedule import indices_of_step, mixture_of
from fastalign.compute import Compute, is_out_of_memory, memory_used_in, peak_memory_bytes
from fastalign.models.load import save_model
from fastalign.progress import phase
from fastalign.ranks.failure import Peers
from fastalign.ranks.parallel import reshard
from fastalign.report.end_of_run import held_out_line
from fastalign.rollouts import OverlappedSampler, RankZeroSampler
from fastalign.runs.accumulate import Total
from fastalign.runs.best import BestModel, RunResult
from fastalign.runs.checkpoint.restore import resume
from fastalign.runs.checkpoint.writer import CHECKPOINTS, CheckpointFailed, CheckpointWriter
from fastalign.runs.config import DataConfig, TrainingConfig
from fastalign.runs.final_model import OtherFolders, card_of_run, print_end, save_final_model
from fastalign.runs.folder import tracked_run, write_sources
from fastalign.runs.inputs import (
    Inputs,
    examples_per_step,
    fingerprints,
    inputs_of_all,
    print_small_data,
    total_steps,
)
from fastalign.runs.metrics import (
    KeptLines,
    Metrics,
    MetricsWriter,
    ProgressDisplay,
    all_skipped,
    plain_numbers,
    skipped_line,
)
from fastalign.runs.observe import StallWatch, stop_on_signal, traced
from fastalign.runs.state import (
    TrainState,
    apply_gradient,
    clipped_norm,
    make_optimizer,
    random_state,
    restore_random_state,
)

MAX_SKIPPED_IN_A_ROW = 3
SKIPPED = "a non-finite loss or gradient, or a spike (optim.skip_sigma)"
COLLAPSED = 3  # exit code of a run that its own algorithm ended early
GO_ON = "go on with --run.resume"
STEP = "step "  # how the note on a step that is being taken begins

# (number of a step, from 1; number of the run's steps) -> rows of `samples.jsonl`
TakeSamples = Callable[[int, int], list[dict[str, Any]]]
T = TypeVar("T")


class Run:
    """A run: settings, folder, optimiser, checkpoints and metrics of what a trainer trains.

    `open_run` makes it. Every rank has one and calls its methods in the same order; rank 0 writes.

    Args:
        config: the run's settings.
        title: name of the algorithm, in front of the progress bar.
        compute: device, dtype, packing and ranks of the forwards.
        peers: the other ranks, if there are any.

    Attributes:
        state: model, optimiser and counters, once the run has begun.
        num_steps: optimiser steps of the whole run, once it has begun.
    """

    state: TrainState
    num_steps: int

    def __init__(
        self, config: TrainingConfig, title: str, compute: Compute, peers: Peers | None = None
    ) -> None:
        self._peers = peers
        self.config, self.title, self.compute = config, title, compute
        self.world, self.folder = compute.world, Path(config.run.dir)
        self._resources = ExitStack()  # closed when the run is left
        self._loop = ExitStack()  # closed behind the last step
        self._loops = False
        self._step: Step | None = None
        self._reason: str | None = None
        self._stopped, self._ended = False, ""
        self._metrics: Metrics = {}
        self._writer: MetricsWriter | None = None  # rank 0's
        self._best: BestModel | None = None

    def enter_context(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that is left at the run's end, after the last checkpoint."""
        return self._resources.enter_context(manager)

    def begin(
        self,
        model: Any,
        data: Any,
        *,
        policy: Any = None,
        inputs: Inputs | None = None,
        overlapped: OverlappedSampler | RankZeroSampler | None = None,
        try_evaluation: Callable[[], Metrics] | None = None,
        samples: TakeSamples | None = None,
    ) -> None:
        """Make the optimiser, restore a checkpoint if the run resumes, and open the writers.

        Args:
            model: the module whose parameters are trained.
            data: training examples, with a length and a `fingerprint`, and, if not all of them are
                in each epoch once, a `mixture`.
            policy: the part of `model` that is saved as `model/`; default: all of it.
            inputs: the run's other inputs, which a resumed run must find again.
            overlapped: a sampler that works on the next step's completions, which a checkpoint
                waits for and holds.
            try_evaluation: evaluates a little of the held-out data and returns `eval_...` metrics,
                by whose names a wrong `train.best_metric` is known before the first step; without
                it, at the first evaluation.
            samples: returns the rows of `samples.jsonl` for what was sampled since the last call,
                which belongs to a step of so many; None: none are written.

        Raises:
            ValueError: if there is no checkpoint to resume from, it is another run's, or no
                evaluation gives `train.best_metric`.
        """
        config, folder, world = self.config, self.folder, self.world
        self.state = state = TrainState(model, make_optimizer(model, config.optim))

        def updates(*_: Any) -> None:
            state.whole = False

        state.optimizer.register_step_pre_hook(updates)
        self._mixture, self._overlapped, self._samples = mixture_of(data), overlapped, samples
        self.num_steps = total_steps(config, self._mixture.epoch_size)
        print_small_data(config, self._mixture.epoch_size)
        policy = model if policy is None else policy
        found = fingerprints(config, policy, data, inputs or Inputs())
        self._inputs = inputs_of_all(world.gather(found))
        kept: dict[str, KeptLines] = {}
        if config.run.resume:
            kept = resume(config.run, state, self._inputs, world)
        if config.train.best_metric is not None:
            self._choose_best(try_evaluation)
        if config.run.export is not None:
            self._stopped = True
            return
        held_out = None if inputs is None else inputs.held_out
        world.first_does(lambda: write_sources(folder, data, held_out))
        loop = self._loop
        self._watch = StallWatch(folder, config.train.stall_seconds, world)
        loop.callback(self._watch.close)
        world.first_does(lambda: self._open_writer(kept))
        self._checkpoints = CheckpointWriter(
            folder / CHECKPOINTS,
            config.train.keep_checkpoints,
            world,
            background=config.train.async_checkpoints,
            timeout_seconds=config.parallel.timeout_seconds,
        )
        self._checkpoints.saved = state.step or None
        self._saved_at, self._retried_at = time.monotonic(), 0
        loop.callback(self._checkpoints.close)
        self._signals = loop.enter_context(stop_on_signal(speaks=world.is_first))
        self._display = loop.enter_context(ProgressDisplay(self.title, self.num_steps, state.step))
        self._loops = True
        loop.callback(self._ends_loop)

    def _choose_best(self, try_evaluation: Callable[[], Metrics] | None) -> None:
        """Begin to choose the best model; check the metric's name by an evaluation on trial."""
        state = self.state
        self._best = BestModel(self.config.train, state, self.folder / CHECKPOINTS, self.world)
        names = None
        if try_evaluation is not None and not self.config.run.export:
            before = random_state()
            names = try_evaluation().keys()
            restore_random_state(before)
        self._best.begin(names)
        self._stopped = self._best.out_of_patience  # a resumed run's

    def _open_writer(self, kept: Mapping[str, KeptLines]) -> None:
        run = tracked_run(self.config, self.state.step)
        writer = MetricsWriter(run, kept, self.config.track.to, samples=self._samples is not None)
        self._writer = writer
        self._loop.callback(lambda: writer.close(finished=self._is_finished))

    @property
    def _is_finished(self) -> bool:
        """True if all steps are taken, or patience has ended the run."""
        early = self._best is not None and self._best.out_of_patience
        return self.state.step >= self.num_steps or early

    def _ends_loop(self) -> None:
        self._loops = False

    def steps(self) -> Iterator["Step"]:
        """Yield each step that is to be taken; log it and save it when the next one is asked for.

        Raises:
            ValueError: if three steps in a row were skipped; the run is saved.
            OSError: if the last checkpoint, or lines of `metrics.jsonl`, could not be written.
        """
        while self.state.step < self.num_steps and not self._stopped:
            self._step = step = Step(self)
            yield step
            self._close_step(last=False)
            if not self._stopped and self.state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise ValueError(
                    f"stopped at step {self.state.step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had "
                    f"{SKIPPED}; no weight was changed by them"
                )
        self._loop.close()

    def optimise(self, total: Total) -> Metrics:
        """Apply the gradient that was added up; return the step's metrics.

        The gradient changes no weight if it or the loss is not finite, or if it is a spike
        (`optim.skip_sigma`): `skipped` is then 1.
        """
        assert self._step is not None
        optim, state = self.config.optim, self.state
        norm = clipped_norm(state.model, optim, [total])  # waits for the gradient
        computed = time.perf_counter()
        update = apply_gradient(state, total.loss, norm, optim, self.num_steps)
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
        other_folders: OtherFolders | None = None,
        before_saving: Callable[[], None] = lambda: None,
    ) -> RunResult:
        """Write the models, if the last step is taken or `run.export` is set; return the result.

        Args:
            policy: the model that becomes `model/` (with an adapter also `adapter/`).
            tokenizer: the tokenizer that is saved with it.
            save_model: writes (model, tokenizer, folder) in transformers' layout.
            other_folders: of each further folder its model's base, and the function that writes it.
            before_saving: called on every rank before the models are written, if they are.
        """
        if self._step is not None:  # the trainer left its loop early
            self._close_step(last=True)
            self._loop.close()
        step, export, best = self.state.step, self.config.run.export, self._best
        finished = export is None and self._is_finished
        if finished and self.state.num_skipped_in_a_row >= step > 0:
            raise ValueError(
                f"every step of the run, {step} in all, had {SKIPPED}: no model is written, since "
                "nothing was trained"
            )
        found, steps = None if best is None else best.best, (step, self.num_steps)
        if finished or export is not None:
            if best is not None:
                best.load()
                print(best.final_line())
            folder = self.folder if export is None else Path(export)
            self.world.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
            before_saving()
            save_final_model(
                self.config,
                self.world,
                folder,
                policy,
                tokenizer,
                save_model,
                other_folders or {},
                partial(card_of_run, self.config, self.title, self._inputs, steps, found),
            )
        if export is not None:
            return RunResult(step, False, 0, self.folder, best=found)
        self._ended = "finished" if finished else "stopped"
        if finished:
            return RunResult(step, True, self._signals.exit_code, self.folder, best=found)
        why = "" if self._reason is None else f" ({self._reason})"
        print(f"stopped at step {step}{why}; saved; {GO_ON}")
        if best is not None:
            print(best.line_so_far())
        code = self._signals.exit_code if self._reason is None else COLLAPSED
        return RunResult(step, False, code, self.folder, best=found)

    def __enter__(self) -> "Run":
        """Return the run."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what is open; print the run's numbers if it has ended.

        Behind an error save the run first, and note on it what is saved.
        """
        stack = ExitStack()
        stack.push(self._resources)
        stack.push(self._loop)
        if self._step is not None:
            stack.push(self._step.end)
        try:
            if error is not None and self._loops:
                note = self._save_behind(error)
                if not is_out_of_memory(error):  # whose line names the newest checkpoint itself
                    error.add_note(note)
        finally:
            stack.__exit__(kind, error, trace)
        if error is None and self._ended and self.world.is_first:
            print_end(self.config, self.title, finished=self._ended == "finished")

    def _save_behind(self, error: BaseException) -> str:
        """Save the last whole step of a run that ends by an error; return what is saved.

        Every rank must have that step: those of which a collective failed, since another one ended,
        have it too, and all then save by the checkpoints' own process group.
        """
        step, state = self._step, self.state
        if state.whole and step is not None and not step.finished:
            step.undo()
        number = state.step if state.whole else -1
        together = self._peers is None or self._peers.all_hold(number, error)
        self._try(self._checkpoints.finish, goes_on=False)
        fault = ""
        if not state.whole:
            fault = f"the error came amid the updates of step {state.step + 1}"
        elif not together:
            fault = f"not every rank has the whole step {state.step}"
        elif self._signals.insisted:
            fault = "stopped at once"
        elif isinstance(error, CheckpointFailed):
            fault = f"step {state.step} is lost"
        elif state.step not in (0, self._checkpoints.saved):
            try:
                self._save_alone()
            except Exception as failure:
                fault = f"step {state.step} could not be saved ({failure!r})"
        saved = self._checkpoints.saved
        if saved is None:
            return f"{fault or 'no step was taken'}: nothing is saved"
        return f"{fault}; step {saved} is saved, {GO_ON}".removeprefix("; ")

    def _save_alone(self) -> None:
        """Log the step that is over, and save the state, by no process group but the writer's."""
        step, state = self._step, self.state
        reshard(state.model)
        over = step is None or step.finished
        if step is not None and step.finished and not step.logged:
            self._log(step, step.metrics)
            if self._best is not None and self._best.metric in step.metrics:
                self._best.consider(step.metrics)
        if self._overlapped is not None:
            state.rollouts = self._overlapped.state_on_error(again=not over)
        self._write_checkpoint(wait=True)

    def _close_step(self, *, last: bool) -> None:
        """End the present step and record it."""
        assert self._step is not None
        self._step.end(None, None, None)
        self._record(self._step, last=last)
        self._step = None

    def _record(self, step: "Step", *, last: bool = False) -> None:
        """Log a step, and save it where a checkpoint is due or the run ends behind it."""
        if not step.finished:
            raise ValueError(f"step {step.number}: expected step.finish(metrics) before its end")
        train, state = self.config.train, self.state
        metrics = self._metrics = self._agreed(step.metrics)
        self._log(step, metrics)
        self._display.update(metrics)
        if line := held_out_line(metrics):
            self._display.say(line)
        if metrics["skipped"]:
            self._display.say(skipped_line(metrics))
        self._try(self._checkpoints.check)
        best = self._best
        if best is not None:
            self._consider(best, metrics)
        self._stopped = (
            self._signals.agreed is not None
            or state.step == train.stop_at_step
            or self._reason is not None
            or (best is not None and best.out_of_patience)
        )
        given_up = state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
        if last or self._stopped or given_up or state.step == self.num_steps:
            self._save_last()
        elif (
            self._time_to_save
            or state.step == self._retried_at
            or (train.save_every and state.step % train.save_every == 0)
            or (best is not None and best.step == state.step)
        ):
            self._save()

    def _consider(self, best: BestModel, metrics: Metrics) -> None:
        """Compare the step's evaluation, if there was one, with the best so far."""
        if best.metric in metrics:  # what it is compared with must be on the disk, or known lost
            self._try(self._checkpoints.finish)
        line = best.consider(metrics)
        if line is not None:
            self._display.say(line)

    def _log(self, step: "Step", metrics: Metrics) -> None:
        """Write a step's metrics and samples, on rank 0."""
        rows = [] if self._samples is None else self._samples(step.number, self.num_steps)
        step.logged = True  # whatever comes: no row is written twice
        if self._writer is not None:
            self._writer.write(metrics, rows)

    def _agreed(self, metrics: Metrics) -> Metrics:
        """Agree on what any rank received, and rank 0's clock; return its times, the most memory.

        Sets the signal that all stop for, and whether it is time for a checkpoint.
        """
        minutes = self.config.train.save_minutes
        is_time = bool(minutes) and time.monotonic() >= self._saved_at + 60 * minutes
        ranks = self.world.gather((self._signals.received, is_time, metrics))
        self._time_to_save = ranks[0][1]
        self._signals.agreed = next((found for found, _, _ in ranks if found is not None), None)
        most = max(of_rank["peak_memory_bytes"] for _, _, of_rank in ranks)
        return {**ranks[0][2], "peak_memory_bytes": most}

    def _save(self) -> None:
        """Begin a checkpoint in the midst of the run, which goes on if it cannot be written."""
        self._try(self._checkpoints.finish)
        if self._overlapped is not None:
            self.state.rollouts = self._overlapped.state()
        self._try(self._write_checkpoint)

    def _save_last(self) -> None:
        """Write the last checkpoint, and every line of the metrics."""
        self._try(self._checkpoints.finish, goes_on=False)
        if self._overlapped is not None:
            self.state.rollouts = self._overlapped.state()
        self._write_checkpoint(wait=True)
        self.world.first_does(self._require_written)

    def _require_written(self) -> None:
        assert self._writer is not None
        self._writer.require_written()

    def _write_checkpoint(self, *, wait: bool = False) -> None:
        self._saved_at = time.monotonic()
        extra: dict[str, Any] = {"inputs": self._inputs}
        for file, kept in ({} if self._writer is None else self._writer.kept()).items():
            extra |= kept.as_counters(file)
        before = None if self._writer is None else self._writer.sync
        self._checkpoints.best = None if self._best is None else self._best.step
        self._checkpoints.save(self.state, extra, wait=wait, before=before)

    def _try(self, work: Callable[[], None], *, goes_on: bool = True) -> None:
        """Do work on checkpoints; report one that failed, and set when the next is tried."""
        try:
            work()
        except CheckpointFailed as error:
            if self._best is not None:
                self._best.checkpoint_failed(self._checkpoints.saved)
            wait = 2 ** (self._checkpoints.num_failed - 1)  # steps: each try may write for minutes
            self._retried_at = self.state.step + wait
            again = f"; training goes on, and it is tried again behind step {self._retried_at}"
            self._display.say(f"{error}{again if goes_on else ''}")


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
        finished: whether its updates are done and counted.
        logged: whether its metrics are in `metrics.jsonl`.
    """

    def __init__(self, run: Run) -> None:
        config, state = run.config, run.state
        self.start = time.perf_counter()
        self._run, self.number = run, state.step + 1
        every = config.train.eval_every
        self.evaluates = self.number == run.num_steps or bool(every and self.number % every == 0)
        size = examples_per_step(config, run._mixture.epoch_size)
        self.indices = indices_of_step(run._mixture, size, state.step, seed=config.run.seed)
        self.metrics: Metrics = {}
        self.finished = self.logged = False
        self._before = copy.deepcopy(state.counters()), random_state()
        self._whole, self._computing = ExitStack(), ExitStack()
        self._whole.enter_context(run._watch.step(self.number))
        self._computing.enter_context(memory_used_in(f"{STEP}{self.number}"))
        if isinstance(config.data, DataConfig):  # those that sample show the parts of a step
            named = f"step {self.number}"
            self._computing.enter_context(phase(named, len(self.indices), "examples"))
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
        metrics = plain_numbers(metrics)
        num_tokens = int(metrics.pop("num_packed_tokens"))
        state.step += 1
        state.num_tokens += num_tokens
        state.num_skipped_in_a_row = state.num_skipped_in_a_row + 1 if all_skipped(metrics) else 0
        seconds = time.perf_counter() - self.start
        train = run.config.train
        room = metrics["num_micro_batches"] * train.tokens_per_batch
        self.metrics = {
            "step": state.step,
            "epoch": state.step * len(self.indices) / run._mixture.epoch_size,
            **metrics,
            "num_tokens": state.num_tokens,
            "fill_rate": num_tokens / room if room else 0.0,
            "peak_memory_bytes": peak_memory_bytes(next(state.model.parameters()).device),
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
        }
        self.finished = state.whole = True
        self._whole.enter_context(memory_used_in(f"the evaluation of step {self.number}"))

    def log(self, metrics: Metrics) -> None:
        """Add metrics to those of the finished step; any type of number will do."""
        if not self.finished:
            raise ValueError(f"step {self.number}: expected step.finish(metrics) before step.log")
        self.metrics |= plain_numbers(metrics)

    def undo(self) -> None:
        """Put back counters and random states of its beginning, since no update was made in it."""
        counters, randomness = self._before
        for name, value in counters.items():
            setattr(self._run.state, name, value)
        restore_random_state(randomness)

    def end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the watch over the step; note on an error of memory what was being done."""
        self._whole.push(self._computing)
        self._whole.__exit__(kind, error, trace)
