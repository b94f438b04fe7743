"""The flat loop that every trainer runs: step, log, evaluate, save, stop when asked."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastalign.batch.schedule import indices_of_step
from fastalign.ranks.world import World
from fastalign.rollouts import SamplerFailed
from fastalign.runs.checkpoint.resume import checkpoint_writer, resume, save_run, sources_of
from fastalign.runs.config import AnyConfig
from fastalign.runs.final_model import save_final_model
from fastalign.runs.memory import STEP, memory_used_in, peak_memory_bytes
from fastalign.runs.metrics import Metrics, ProgressDisplay, metrics_writer
from fastalign.runs.observe import StallWatch, traced
from fastalign.runs.optimizer import make_optimizer
from fastalign.runs.signals import StopRequest, stop_on_signal
from fastalign.runs.state import TrainState
from fastalign.runs.task import RunResult, Task

MAX_SKIPPED_IN_A_ROW = 3
SKIPPED = "a non-finite loss or gradient, or a spike (optim.skip_sigma)"
COLLAPSED = 3  # exit code of a run that its own algorithm ended early


def total_steps(config: AnyConfig, num_examples: int) -> int:
    """`max_steps`, or the steps that `epochs` passes take (the last one may reach beyond)."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, math.ceil(config.train.epochs * num_examples / config.train.batch_size))


def indices_of_run(config: AnyConfig, num_examples: int) -> set[int]:
    """The examples that the run will use."""
    used: set[int] = set()
    for step in range(total_steps(config, num_examples)):
        if len(used) == num_examples:
            break
        used.update(
            indices_of_step(num_examples, config.train.batch_size, step, seed=config.run.seed)
        )
    return used


def run_loop(config: AnyConfig, model: Any, task: Task) -> RunResult:
    """Trains until the last step, a signal, `stop_at_step`, or too many skipped steps.

    Every rank runs it; rank 0 writes what the run says.

    Raises:
        ValueError: three steps in a row were skipped.
        SamplerFailed: the sampler failed for good; the run is saved.
        OSError: a checkpoint could not be written.
    """
    folder, world = Path(config.run.dir), task.world
    state = TrainState(model, make_optimizer(model, config.optim))
    num_steps = total_steps(config, task.num_examples)
    policy = model if task.policy is None else task.policy
    sources = sources_of(task, policy)
    num_bytes = resume(config.run, state, sources, world) if config.run.resume else 0
    if config.run.export is not None:
        return export(config, policy, task, state.step)
    writer = metrics_writer(folder, world, num_bytes=num_bytes, step=state.step)
    watch = StallWatch(folder, config.train.stall_seconds, world)
    checkpoints = checkpoint_writer(config, world)
    save = partial(save_run, checkpoints, writer, task, state, sources)

    metrics: Metrics = {}
    reason: str | None = None
    saved_at = state.step if config.run.resume else -1
    try:
        with stop_on_signal() as stop, ProgressDisplay(task.title, num_steps, state.step) as shown:
            while state.step < num_steps:
                with watch.step(state.step + 1):
                    metrics, unmeasured = next_metrics(config, state, task, num_steps, save)
                metrics = agreed(world, metrics, stop)
                writer.write(metrics)
                shown.update(metrics)
                if metrics["skipped"]:
                    shown.say(skipped_line(metrics))
                checkpoints.check()
                reason = task.stop_reason(metrics)
                stopping = should_stop(config, state, stop) or reason is not None
                due = config.train.save_every and state.step % config.train.save_every == 0
                last = bool(stopping or unmeasured or given_up(state) or state.step == num_steps)
                if due or last:
                    save(last=last)
                    saved_at = state.step
                if unmeasured is not None:
                    raise stopped_sampling(unmeasured, state.step) from unmeasured
                if stopping:
                    break
                check_skipped(state)
    finally:
        checkpoints.close()
        writer.close()
        watch.close()
    finished = state.step >= num_steps
    if finished:
        save_final_model(config, policy, task, folder)
    else:
        print(stopped_line(state.step, reason), flush=True)
    assert saved_at == state.step
    return RunResult(state.step, finished, exit_code(finished, reason, stop), metrics)


def exit_code(finished: bool, reason: str | None, stop: StopRequest) -> int:
    """Of a run that its own algorithm ended early, or a signal, or that came to its end."""
    return COLLAPSED if reason is not None and not finished else stop.exit_code


def export(config: AnyConfig, policy: Any, task: Task, step: int) -> RunResult:
    """Writes the restored models to `run.export`, in transformers' layout."""
    assert config.run.export is not None
    folder = Path(config.run.export)
    task.world.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
    save_final_model(config, policy, task, folder)
    return RunResult(step, finished=False, exit_code=0, metrics={})


def agreed(world: World, metrics: Metrics, stop: StopRequest) -> Metrics:
    """What every rank goes by: a signal that any of them got, rank 0's times, the most memory."""
    ranks = world.gather((stop.received, metrics))
    stop.agreed = next((signal for signal, _ in ranks if signal is not None), None)
    most = max(of_rank["peak_memory_bytes"] for _, of_rank in ranks)
    return {**ranks[0][1], "peak_memory_bytes": most}


def given_up(state: TrainState) -> bool:
    """Whether too many steps in a row were skipped."""
    return state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW


def check_skipped(state: TrainState) -> None:
    """Ends a run that takes no steps any more; it is saved.

    Raises:
        ValueError: the latest ones were skipped.
    """
    if given_up(state):
        raise ValueError(
            f"stopped at step {state.step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had {SKIPPED}; "
            "no weight was changed by them; saved, go on with --run.resume"
        )


def all_skipped(metrics: Metrics) -> bool:
    """Whether none of a step's updates was applied, and there were some."""
    return metrics["skipped"] == metrics.get("num_updates", 1) > 0


def skipped_line(metrics: Metrics) -> str:
    """What is said of a step whose gradient was not applied, or not all of its updates."""
    skipped, several = metrics["skipped"], metrics.get("num_updates", 1)
    of_all = "" if all_skipped(metrics) else f": {skipped} of {several} updates"
    return (
        f"step {metrics['step']}{of_all} skipped: loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; no weight was changed by it"
    )


def next_metrics(
    config: AnyConfig, state: TrainState, task: Task, num_steps: int, save: Callable[[], None]
) -> tuple[Metrics, SamplerFailed | None]:
    """Of one step and the evaluation that is due behind it, or why that could not be made.

    Raises:
        SamplerFailed: there is nothing to take the step with; the run is saved.
    """
    try:
        metrics = one_step(config, state, task, num_steps)
    except SamplerFailed as failure:  # which came before any weight was changed
        save()
        raise stopped_sampling(failure, state.step) from failure
    try:
        return metrics | evaluation(config, state, task, num_steps), None
    except SamplerFailed as failure:
        return metrics, failure


def stopped_line(step: int, reason: str | None) -> str:
    """What is said where a run ends before its last step."""
    why = "" if reason is None else f" ({reason})"
    return f"stopped at step {step}{why}; saved; go on with --run.resume"


def stopped_sampling(failure: SamplerFailed, step: int) -> SamplerFailed:
    """What is said where a sampler failed for good; nothing of the run is lost."""
    return SamplerFailed(f"{failure}; step {step} is saved, go on with --run.resume")


def should_stop(config: AnyConfig, state: TrainState, stop: StopRequest) -> bool:
    """Whether the ranks agreed to stop for a signal, or `stop_at_step` is reached."""
    return stop.agreed is not None or state.step == config.train.stop_at_step


def one_step(config: AnyConfig, state: TrainState, task: Task, num_steps: int) -> Metrics:
    """Takes one optimiser step; returns what is logged of it."""
    start = time.perf_counter()
    batch_size = config.train.batch_size
    indices = indices_of_step(task.num_examples, batch_size, state.step, seed=config.run.seed)
    folder, step = Path(config.run.dir), state.step + 1
    profiled = traced(folder, wanted=step == config.train.profile, step=step, world=task.world)
    with memory_used_in(f"{STEP}{step}"), profiled:
        metrics, num_tokens = task.take_step(state, indices, num_steps)
    state.step += 1
    state.num_tokens += num_tokens
    state.num_skipped_in_a_row = state.num_skipped_in_a_row + 1 if all_skipped(metrics) else 0
    seconds = time.perf_counter() - start
    room = metrics["num_micro_batches"] * config.train.tokens_per_batch
    metrics = {
        "step": state.step,
        "epoch": state.step * batch_size / task.num_examples,
        **metrics,
        "num_tokens": state.num_tokens,
        "fill_rate": num_tokens / room if room else 0.0,
        "peak_memory_bytes": peak_memory_bytes(next(state.model.parameters()).device),
        "step_seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
    }
    return metrics


def evaluation(config: AnyConfig, state: TrainState, task: Task, num_steps: int) -> Metrics:
    """The metrics on held-out data, where they are due."""
    every = config.train.eval_every
    if task.evaluate is not None and (
        state.step == num_steps or (every and state.step % every == 0)
    ):
        with memory_used_in(f"the evaluation of step {state.step}"):
            return task.evaluate()
    return {}
