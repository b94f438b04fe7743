"""The end of a run, and its best model by a metric of its evaluations.

What is known of the best is in `TrainState.kept`, so that a checkpoint holds it and a resumed run
decides as one without a stop. The best step's checkpoint is kept beside the newest ones.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.nearest import did_you_mean, nearest
from fastalign.ranks.world import World
from fastalign.report.runs import read_lines
from fastalign.runs.checkpoint.restore import restore_weights
from fastalign.runs.checkpoint.writer import MANIFEST, checkpoint_of_step
from fastalign.runs.config import TrainConfig, TrainingConfig
from fastalign.runs.metrics import METRICS, Metrics
from fastalign.runs.state import TrainState

EVALUATED = "eval_"  # how the names of an evaluation's metrics begin
_MORE_IS_BETTER = re.compile(
    r"(.*_)?accuracy|margin|reward|rewards/(accuracies|margins|chosen|.+/mean)"
    r"|objective/(scores|rlhf_reward)"
)
_LESS_IS_BETTER = re.compile(
    r"(.*[_/])?(loss|kl|jsd|perplexity|cross_entropy)|completions/(clipped|repeated)_ratio"
)
_NO_CHOICE = re.compile(r"(.*[/_])?(num_.*|time/.*|policy_version)")


class Best(NamedTuple):
    """The best evaluation so far: its step, and the metric's value."""

    step: int
    value: float


@dataclass(frozen=True)
class RunResult:
    """The end of a run.

    Attributes:
        step: optimiser steps taken.
        finished: whether all steps are done and `model/` (or `adapter/`) is written.
        exit_code: 0 finished, or stopped by a scheduler's signal; 130 after SIGINT, 129 after
            SIGHUP, 3 if the algorithm's own check stopped the run.
        folder: the run's folder.
        model: the trained model of transformers, float32 (with a frozen base: in its dtype), in
            evaluation mode; a rank's part of it under FSDP2.
        tokenizer: its tokenizer.
        best: step and value of the best evaluation by `train.best_metric`, if that was asked for
            and there is one; the models of a finished run are that step's.
    """

    step: int
    finished: bool
    exit_code: int
    folder: Path
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    best: Best | None = None

    @cached_property
    def metrics(self) -> list[Metrics]:
        """Metrics of each step of the whole run, read from its folder; held-out ones `eval_...`."""
        file = self.folder / METRICS
        rows = read_lines(file) if file.is_file() else ()
        return [
            {name: float(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows
        ]


def direction_of(train: TrainConfig) -> str:
    """Return `max` or `min`, as `train.best_direction` says or by the metric's name.

    Raises:
        ValueError: if the name does not tell.
    """
    assert train.best_metric is not None
    if train.best_direction != "auto":
        return train.best_direction
    name = train.best_metric.removeprefix(EVALUATED)
    if _MORE_IS_BETTER.fullmatch(name):
        return "max"
    if _LESS_IS_BETTER.fullmatch(name):
        return "min"
    raise ValueError(
        f"train.best_direction: expected max or min, since {train.best_metric} may be better if it "
        "is more or less; got auto"
    )


def check_best_metric(config: TrainingConfig) -> None:
    """Raise ValueError if there are no evaluations, before anything is loaded."""
    if config.data.eval is None:
        raise ValueError(
            "train.best_metric: a metric of evaluations; expected held-out data with it "
            "(--data.eval), got none"
        )


def last_part(metric: str) -> str:
    """Return the last word of a metric's name: `accuracies` of `eval_rewards/accuracies`."""
    return metric.removeprefix(EVALUATED).rpartition("/")[2]


class BestModel:
    """The choice of a run's best model.

    All ranks call its methods in the same order, with the same metrics.

    Args:
        train: settings, with a `best_metric`.
        state: the run's state, whose `kept` holds what is known.
        checkpoints: the folder of the run's checkpoints.
        world: the ranks.
    """

    def __init__(
        self, train: TrainConfig, state: TrainState, checkpoints: Path, world: World
    ) -> None:
        assert train.best_metric is not None
        self.metric, self._patience = train.best_metric, train.patience
        self._direction = ""
        self._train, self._state = train, state
        self._checkpoints, self._world = checkpoints, world
        self._replaced: Best | None = None

    def _key(self, what: str) -> str:
        return f"best/{self._direction}/{self.metric}/{what}"

    @property
    def best(self) -> Best | None:
        """The best evaluation so far, or None."""
        kept = self._state.kept
        if self._key("step") not in kept:
            return None
        return Best(int(kept[self._key("step")]), kept[self._key("value")])

    @property
    def step(self) -> int | None:
        """Step of the best evaluation so far, or None."""
        return None if self.best is None else self.best.step

    @property
    def num_not_better(self) -> int:
        """Number of evaluations since the best."""
        return int(self._state.kept.get(self._key("num_not_better"), 0))

    @property
    def out_of_patience(self) -> bool:
        """True if the run ends, since too many evaluations in a row were not better."""
        return self._patience is not None and self.num_not_better >= self._patience

    def begin(self, names: Collection[str] | None) -> None:
        """Check the metric's name, if names are known, and that the best checkpoint is there.

        Raises:
            ValueError: if no evaluation gives the metric, or its direction is not known.
        """
        if names is not None:
            self._check_name(names)
        self._direction = direction_of(self._train)
        found = self.best
        if found is None:
            return
        path = checkpoint_of_step(self._checkpoints, found.step)
        if not self._world.of_first((path / MANIFEST).is_file()):
            self._keep(None)
            print(
                f"{path}, the best by {self.metric} so far, is gone: the best is chosen among the "
                "evaluations from here on"
            )

    def _check_name(self, names: Collection[str]) -> None:
        found = sorted(name for name in names if name.startswith(EVALUATED))
        if self.metric in found:
            return
        shown = [name for name in found if not _NO_CHOICE.fullmatch(name.removeprefix(EVALUATED))]
        ends = {last_part(name): name for name in reversed(shown)}
        like, end = f"{EVALUATED}{self.metric}", nearest(last_part(self.metric), ends)
        meant = like if like in found else nearest(self.metric, shown, 0.8) or ends.get(end or "")
        raise ValueError(
            f"train.best_metric: expected a metric of the run's evaluations, one of "
            f"{', '.join(shown) or 'none'}; got {self.metric!r}{did_you_mean(meant)}"
        )

    def is_better(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether a step's metrics are those of a better evaluation than the best so far."""
        if self.metric not in metrics:
            return False
        value, best = float(metrics[self.metric]), self.best
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value > best.value if self._direction == "max" else value < best.value

    def consider(self, metrics: Mapping[str, Any]) -> str | None:
        """Take a finished step's metrics into account.

        Returns:
            A line on its evaluation; None without one.

        Raises:
            ValueError: if its evaluation has no such metric.
        """
        if not any(name.startswith(EVALUATED) for name in metrics):
            return None
        self._check_name(metrics)
        state, best = self._state, self.best
        value = float(metrics[self.metric])
        told = f"step {state.step}: {self.metric} {value:.6g}"
        if self.is_better(metrics):
            self._replaced = best
            self._keep(Best(state.step, value))
            return f"{told}, the best so far"
        number = self.num_not_better + 1
        state.kept[self._key("num_not_better")] = number
        limit = "" if self._patience is None else f" of {self._patience}"
        than = "not finite"
        if best is not None:
            than = f"no better than {best.value:.6g} of step {best.step}"
        return f"{told}, {than} ({number}{limit})"

    def _keep(self, best: Best | None) -> None:
        kept = self._state.kept
        for what in ("step", "value", "num_not_better"):
            kept.pop(self._key(what), None)
        if best is not None:
            kept[self._key("step")], kept[self._key("value")] = best

    def checkpoint_failed(self, saved: int | None) -> None:
        """Go back to the best before, if the best one's checkpoint could not be written.

        `saved` is the step of the newest checkpoint that is on the disk.
        """
        if self.best is not None and self.best.step > (saved or 0):
            self._keep(self._replaced)
            self._replaced = None

    def load(self) -> None:
        """Load the best step's weights into the model.

        Raises:
            ValueError: if its checkpoint has a fault.
        """
        found = self.best
        if found is None or found.step == self._state.step:
            return
        try:
            path = checkpoint_of_step(self._checkpoints, found.step)
            restore_weights(path, self._state.model, self._world)
        except ValueError as error:
            raise ValueError(
                f"train.best_metric: the best step's checkpoint cannot be used: {error}; "
                "--run.resume without --train.best-metric writes the last step's model"
            ) from error

    def final_line(self) -> str:
        """Return whose step's model is written and, if patience ended the run, that it did."""
        metric, last, best = self.metric, self._state.step, self.best
        front = ""
        if self.out_of_patience:
            front = (
                f"ended at step {last}: {self.num_not_better} evaluations in a row without a "
                f"better {metric} (train.patience)\n"
            )
        if best is None:
            return f"{front}no evaluation gave a finite {metric}: the model is that of step {last}"
        return (
            f"{front}{metric} was best at step {best.step} of {last}: {best.value:.6g}; the model "
            "is that step's"
        )

    def line_so_far(self) -> str:
        """Return which step is the best so far, in words."""
        if self.best is None:
            return f"no evaluation has given a finite {self.metric} yet"
        return f"{self.metric} was best at step {self.best.step} so far: {self.best.value:.6g}"
