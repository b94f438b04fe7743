"""What an algorithm gives the loop, and what the loop gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.models import save_model
from fastalign.ranks.world import World
from fastalign.runs.metrics import Metrics
from fastalign.runs.state import TrainState
from fastalign.runs.step import TakeStep


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        step: optimiser steps taken.
        finished: all steps are done and `model/` (or `adapter/`) is written.
        exit_code: 0, 130 after SIGINT, or 3 where `Task.stop_reason` ended it.
        metrics: the last step's.
    """

    step: int
    finished: bool
    exit_code: int
    metrics: Metrics


@dataclass(frozen=True)
class Task:
    """What an algorithm gives the loop.

    Attributes:
        title: in front of the progress bar.
        num_examples: of the training data.
        data_fingerprint: of the training data's token ids.
        tokenizer: saved with the model.
        world: the ranks, all of which run the task.
        take_step: changes the model by these examples; returns the step's metrics (`loss`,
            `num_micro_batches`, `skipped` and others) and the packed tokens computed.
        evaluate: metrics on the held-out data, names beginning with `eval_`; None without data.
        save_model: writes (model, tokenizer, folder) in transformers' layout.
        policy: what is saved as `model/`, where it is a part of what is trained; None: all of it.
        reference: a frozen model that the run began with and a checkpoint does not hold, or None.
        reference_fingerprint: of a reference of which only log-probs are left, or None.
        other_folders: more that is written at the end: the folder's name to what writes it.
        stop_reason: why the run should end after a step with these metrics, or None.
        before_save: puts into the state what a checkpoint needs of what is under way.
    """

    title: str
    num_examples: int
    data_fingerprint: str
    tokenizer: Any
    world: World
    take_step: TakeStep
    evaluate: Callable[[], Metrics] | None
    save_model: Callable[[Any, Any, Path], None] = save_model
    policy: Any = None
    reference: Any = None
    reference_fingerprint: str | None = None
    other_folders: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    stop_reason: Callable[[Metrics], str | None] = lambda metrics: None
    before_save: Callable[[TrainState], None] = lambda state: None
