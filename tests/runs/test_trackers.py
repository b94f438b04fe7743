"""Trackers get each step once, on rank 0, and end no run; none is opened that is not named."""

import importlib.util
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastalign.cli.main import main
from fastalign.report import trackers
from fastalign.report.trackers import TRACKERS, Known, TrackedRun, Trackers
from fastalign.runs.config import TrackConfig
from fastalign.trainers import train_dpo, train_sft
from tests import rank_processes as ranks
from tests.small_runs import dpo_config, read_metrics, sft_config


class Recorder:
    """A tracker that records; of two runs with one key the second goes on with the first."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails_at: ClassVar[str | int] = ""

    def __init__(self, run: TrackedRun) -> None:
        self.calls.append(("open", run))
        if self.fails_at == "open":
            raise ConnectionError("no server\nhere")

    def log(self, numbers: Any, step: int) -> None:
        self.calls.append(("log", step, dict(numbers)))
        if self.fails_at == step:
            raise RuntimeError("the server is gone\nfor ever")

    def close(self, *, finished: bool) -> None:
        self.calls.append(("close", finished))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "fails_at", "")
    monkeypatch.setitem(TRACKERS, "mlflow", Known(Recorder, "json", "The records"))
    return Recorder


def tracked(config: Any, *names: Any, **more: Any) -> Any:
    return replace(config, track=TrackConfig(names, **more))


def names_of(calls: list[tuple[Any, ...]]) -> list[Any]:
    return [call[0] if call[0] != "log" else call[1] for call in calls]


def test_a_tracker_gets_the_settings_and_each_step_with_its_evaluation(
    folder: Path, recorder: type[Recorder]
) -> None:
    train_sft(tracked(sft_config(folder, "run", max_steps=3, eval_every=2), "mlflow"))
    calls = recorder.calls
    assert names_of(calls) == ["open", 1, 2, 3, "close"]
    run = calls[0][1]
    assert (run.name, run.project, run.step) == ("run", "fastalign", 0)
    assert run.settings["optim.lr"] == 1e-3
    rows = [{"step": step, **numbers} for _, step, numbers in calls[1:-1]]
    assert rows == read_metrics(folder / "run")
    assert "eval_loss" in rows[1]
    assert calls[-1] == ("close", True)


def test_a_run_that_patience_ended_is_finished(folder: Path, recorder: type[Recorder]) -> None:
    rising = {"best_metric": "eval_loss", "best_direction": "max", "patience": 1}  # it falls
    config = sft_config(folder, "run", max_steps=6, eval_every=1, **rising)
    assert train_sft(tracked(config, "mlflow")).step == 2
    assert names_of(recorder.calls) == ["open", 1, 2, "close"]
    assert recorder.calls[-1] == ("close", True)


def test_a_resumed_run_has_the_same_key_and_says_where_it_stands(
    folder: Path, recorder: type[Recorder]
) -> None:
    train_sft(tracked(sft_config(folder, "run", max_steps=4, stop_at_step=2), "mlflow"))
    assert recorder.calls[-1] == ("close", False)
    config = sft_config(folder, "run", max_steps=4, resume=True)
    train_sft(tracked(config, "mlflow", project="other", name="again"))
    assert names_of(recorder.calls) == ["open", 1, 2, "close", "open", 3, 4, "close"]
    first, second = (call[1] for call in recorder.calls if call[0] == "open")
    assert first.key == second.key != ""
    assert (second.step, second.project, second.name) == (2, "other", "again")


@pytest.mark.parametrize(
    ("fails_at", "reason"), [("open", "no server"), (2, "the server is gone")], ids=str
)
def test_a_tracker_that_fails_ends_no_run_and_is_said_once(
    fails_at: Any,
    reason: str,
    folder: Path,
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recorder, "fails_at", fails_at)
    assert train_sft(tracked(sft_config(folder, "run", max_steps=4), "mlflow")).finished
    assert names_of(recorder.calls) == (["open"] if fails_at == "open" else ["open", 1, 2])
    assert capsys.readouterr().out.count(f"The records are not complete: {reason}\n") == 1


def record_rank(config: Any) -> None:
    TRACKERS["mlflow"] = Known(Recorder, "json", "The records")
    assert train_dpo(config).finished
    print(f"called: {names_of(Recorder.calls)}", file=sys.stderr)


def test_rank_0_alone_opens_trackers(folder: Path) -> None:
    config = tracked(dpo_config(folder, "run", max_steps=2), "mlflow")
    first, second = ranks.run(2, folder / "logs", record_rank, config)
    assert "called: ['open', 1, 2, 'close']" in first
    assert "called: []" in second


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_before_anything_is_loaded(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = importlib.util.find_spec
    missing = TRACKERS[name].package  # type: ignore[index]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda known: None if known == missing else plain(known)
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    files = ["--model.path", str(folder / "none"), "--data.train", str(folder / "none.jsonl")]
    assert main(["sft", *files, "--run.dir", str(folder / "run"), "--track.to", name]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"fastalign sft: track.to: {name} needs a package that is not installed: "
        f"pip install 'fastalign[{name}]'"
    )
    assert not (folder / "run").exists()


def test_an_unknown_tracker_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"track\.to: expected some of tensorboard, wandb, mlflow"):
        TrackConfig(("comet",))  # type: ignore[arg-type]


def test_none_is_opened_that_is_not_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: TrackedRun) -> Any:
        raise AssertionError("opened")

    for name, known in TRACKERS.items():
        monkeypatch.setitem(TRACKERS, name, known._replace(open=refuse))
    train_sft(sft_config(folder, "run", max_steps=1))
    names = {path.name for path in (folder / "run").iterdir()}
    assert not names & {"tensorboard", "wandb", "mlruns"}


# What each tracker holds of a run: [(step, metrics)], its settings, and whether it is marked as
# finished (None: the tracker has no such mark).
Held = tuple[list[tuple[int, dict[str, float]]], dict[str, str] | None, bool | None]


def in_tensorboard(folder: Path) -> Held:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    rows = [
        (e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)
    ]
    for step, name, value in rows:
        assert name not in found.setdefault(step, {}), "a point is there twice"
        found[step][name] = value
    return sorted(found.items()), None, None


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of W&B's file of an offline run, which has the format of LevelDB's logs."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is too small for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def in_wandb(folder: Path) -> Held:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    rows: list[tuple[int, dict[str, float]]] = []
    settings: dict[str, str] = {}
    codes: list[int] = []
    for path in sorted((folder / "run/wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            assert record.run.host == ""
            for item in record.run.config.update:
                settings[item.key or "/".join(item.nested_key)] = item.value_json
            values = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if values:
                numbers = {k: float(v) for k, v in values.items() if not k.startswith("_")}
                rows.append((int(values["_step"]), numbers))
            if record.WhichOneof("record_type") == "exit":
                codes.append(record.exit.exit_code)
    assert codes == [1, 0]
    return rows, settings, True


def in_mlflow(folder: Path) -> Held:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("fastalign")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    found: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            assert name not in found.setdefault(point.step, {}), "a point is there twice"
            found[point.step][name] = point.value
    return sorted(found.items()), dict(run.data.params), run.info.status == "FINISHED"


def in_trackio(folder: Path) -> Held:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("fastalign")
    rows = [
        (row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")})
        for row in SQLiteStorage.get_logs("fastalign", name)
    ]
    return rows, None, None


READ: dict[str, Callable[[Path], Held]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


@pytest.fixture
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each tracker's own local place, below the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore")  # of the packages' own imports
def test_a_tracker_holds_each_step_once_also_of_a_run_that_was_killed(
    name: str, at_home: Path
) -> None:
    package = TRACKERS[name].package  # type: ignore[index]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'fastalign[{name}]'")
    folder = at_home
    config = sft_config(folder, "run", max_steps=6, eval_every=3, save_every=2)

    class Killed(Exception):
        pass

    def killed_after(step: int) -> Callable[..., None]:
        plain = Trackers.log

        def log(self: Trackers, numbers: Any, number: int) -> None:
            plain(self, numbers, number)
            if number == step:
                self.close(finished=False)
                raise Killed

        return log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trackers, "log", killed_after(3))
        with pytest.raises(Killed):
            train_sft(tracked(config, name))
    # Step 3 is in the tracker; the run goes on from an earlier checkpoint and takes it again.
    for path in (folder / "run/checkpoints").glob("step-000003*"):
        path.rename(folder / path.name)
    run = replace(config.run, resume=True)
    assert train_sft(replace(tracked(config, name), run=run)).finished
    rows, settings, finished = READ[name](folder)
    expected = read_metrics(folder / "run")
    assert [step for step, _ in rows] == [row.pop("step") for row in expected] == list(range(1, 7))
    for (_, numbers), row in zip(rows, expected, strict=True):
        assert numbers.keys() == row.keys()
        for key, value in row.items():
            if "second" not in key and "memory" not in key:  # of the time it was taken first
                assert math.isclose(numbers[key], value, rel_tol=1e-5), key
    if settings is not None:
        assert float(settings["optim.lr"]) == 1e-3
    assert finished in (True, None)


def test_without_a_key_wandb_is_said_before_it_would_ask(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed: pip install 'fastalign[wandb]'")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    wandb.teardown()  # it keeps the settings of its first call
    with pytest.raises(ValueError, match=r"track\.to: wandb has no key; type wandb login, or set"):
        trackers.check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    trackers.check_trackers(["wandb"])
    wandb.teardown()
