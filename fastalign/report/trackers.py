"""Trackers of experiments that a run's numbers go to beside `metrics.jsonl`, if they are named.

Each is a class with the methods of `Tracker` and a row of TRACKERS; its package is an extra. On
rank 0 alone a run opens those that `--track.to` names. What fails in one of them ends no run.
"""

import errno
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastalign.choices import TrackerName

Numbers = Mapping[str, float | int]
BOARD_BYTES = 2**18  # that must be free for TensorBoard's writer to go on
NOTES = "tracked.json"  # in a run's folder
MLFLOW_TAG = "fastalign.run"  # holds the key of a run
MLFLOW_PARAMS = 100  # that MLflow takes in one call
MLFLOW_VALUE = 500  # characters of a parameter that every version of it takes


@dataclass(frozen=True)
class TrackedRun:
    """Facts about a run that a tracker is given.

    Attributes:
        folder: the run's folder.
        key: a name of the run that no other has, and a resumed run keeps.
        name: the run's name in the tracker.
        project: the name that the tracker gathers runs under.
        settings: all settings, by their dotted names.
        step: number of steps that were taken before.
    """

    folder: Path
    key: str
    name: str
    project: str
    settings: Mapping[str, Any]
    step: int


class Tracker(Protocol):
    """A tracker that is open on a run."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run, or go on with it."""

    def log(self, numbers: Numbers, step: int) -> None:
        """Log the numbers of a step."""

    def close(self, *, finished: bool) -> None:
        """Close the run, which took all its steps if it `finished`."""


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.folder
        self._require_room()
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, numbers: Numbers, step: int) -> None:
        """Add each number as a scalar."""
        self._require_room()
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _require_room(self) -> None:
        # On a full disk a thread of its own would print a traceback.
        if shutil.disk_usage(self._folder).free < BOARD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class WeightsAndBiases:
    """A run of Weights & Biases; with WANDB_MODE=offline a folder, `wandb/` in the run's.

    It is given numbers and settings alone: no console output, no code, no name of the machine.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.key,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(
                silent=True,  # its own lines have colours, which are not passed on
                console="off",
                host="",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
            ),
        )
        place = self._run.url or f"{run.folder}/wandb (type wandb sync to send it)"
        print(f"W&B: {run.name} in {place}")

    def log(self, numbers: Numbers, step: int) -> None:
        """Log the numbers."""
        self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        """Finish the run; one that did not take all its steps is marked as failed."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, in the store that MLflow itself takes (MLFLOW_TRACKING_URI)."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        experiment = self._client.get_experiment_by_name(run.project)
        number = (
            self._client.create_experiment(run.project)
            if experiment is None
            else experiment.experiment_id
        )
        found = self._client.search_runs(
            [number], filter_string=f"tags.`{MLFLOW_TAG}` = '{run.key}'", max_results=1
        )
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(number, run_name=run.name, tags={MLFLOW_TAG: run.key})
        self._id = created.info.run_id
        params = [Param(name, str(v)[:MLFLOW_VALUE]) for name, v in run.settings.items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])

    def log(self, numbers: Numbers, step: int) -> None:
        """Log the numbers, in one call."""
        now = int(1000 * time.time())
        rows = [
            self._metric(re.sub(r"[^\w\-. /:]", "_", name), value, now, step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self._id, metrics=rows)

    def close(self, *, finished: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Trackio:
    """A run of trackio, in a local data base that `trackio show` opens."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # trackio knows a run by its name, and two folders may have one name.
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.key}",
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, numbers: Numbers, step: int) -> None:
        """Log the numbers."""
        self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        """Write what is left."""
        self._run.finish()


class Known(NamedTuple):
    """A tracker that `--track.to` can name.

    Attributes:
        open: its class.
        package: the package that it needs.
        records: what it keeps, in words.
        forgets: whether it drops what it has of steps behind the run's checkpoint.
    """

    open: type[Tracker]
    package: str
    records: str
    forgets: bool = False


TRACKERS: dict[TrackerName, Known] = {
    "tensorboard": Known(TensorBoard, "tensorboard", "TensorBoard's files", forgets=True),
    "wandb": Known(WeightsAndBiases, "wandb", "W&B's records"),
    "mlflow": Known(MLflow, "mlflow", "MLflow's records"),
    "trackio": Known(Trackio, "trackio", "trackio's records"),
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the trackers can be opened, before anything is loaded.

    Raises:
        ValueError: if a package is not installed, or W&B would ask for a key.
    """
    for name in names:
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            raise ValueError(
                f"track.to: {name} needs a package that is not installed: "
                f"pip install 'fastalign[{name}]'"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        require_wandb_key()


def require_wandb_key() -> None:
    """Raise ValueError if W&B has no key, for which it would ask on the terminal."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if settings.mode == "online" and not wbauth.authenticate_session(
        host=settings.base_url, source="fastalign", prompt=False
    ):
        raise ValueError(
            "track.to: wandb has no key; type wandb login, or set WANDB_MODE=offline to keep the "
            "run's records in its folder"
        )


class Trackers:
    """The open trackers of a run; one that fails is reported once, and left out from then on.

    `tracked.json` in the run's folder notes the last step that each of them got, so that a step
    that is taken again, behind a checkpoint, is not logged twice.
    """

    def __init__(self, names: Sequence[TrackerName], run: TrackedRun) -> None:
        self._notes, self._key = run.folder / NOTES, run.key
        self._logged: dict[str, int] = read_notes(self._notes).get(run.key, {})
        self._open: dict[TrackerName, Tracker] = {}
        for name in dict.fromkeys(names):
            self._try(name, partial(self._add, name, run))

    def _add(self, name: TrackerName, run: TrackedRun) -> None:
        self._open[name] = TRACKERS[name].open(run)

    def log(self, numbers: Numbers, step: int) -> None:
        """Log the numbers of a step."""
        for name, tracker in list(self._open.items()):
            if TRACKERS[name].forgets or step > self._logged.get(name, 0):
                self._try(name, partial(tracker.log, numbers, step))
                self._logged[name] = step
        if self._open:
            with suppress(OSError):  # of a full disk: a step may then be there twice
                self._notes.write_text(json.dumps({self._key: self._logged}))

    def close(self, *, finished: bool) -> None:
        """Close the run in each of them."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.close, finished=finished))
        self._open = {}

    def _try(self, name: TrackerName, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # packages raise their own, and those of what they stand on
            self._open.pop(name, None)
            reason = error.strerror if isinstance(error, OSError) else None
            reason = reason or (str(error).strip().splitlines() or [repr(error)])[0]
            print(f"{TRACKERS[name].records} are not complete: {reason}")


def read_notes(path: Path) -> dict[str, dict[str, int]]:
    """Return what `Trackers` noted, by the run's key; nothing if there is no such file, or half."""
    try:
        found = json.loads(path.read_text())
        return {key: {name: int(step) for name, step in of.items()} for key, of in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}
