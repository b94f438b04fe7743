"""A run's folder: refused when it holds another run, its configuration saved, its lock held."""

import fcntl
import itertools
import json
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from fastalign.compute import find_device
from fastalign.ranks.world import world_of_environment
from fastalign.report.trackers import NOTES, TrackedRun
from fastalign.runs.checkpoint.writer import CHECKPOINTS, list_checkpoints
from fastalign.runs.config import RunConfig, TrainingConfig, config_to_dict
from fastalign.runs.metrics import METRICS, SAMPLES
from fastalign.written_files import clear_half_written, write_atomically
from fastalign.yaml_file import flat_settings, read_yaml_file

CONFIG = "config.yaml"
FINAL_MODELS = ("model", "adapter", "value")

# Settings that may differ when a run is resumed: they change neither weights nor their order.
MAY_CHANGE = {
    *("run.dir", "run.resume", "run.export", "run.start_afresh", "run.overwrite"),
    *("run.accept_changed", "data.eval", "model.save_dtype", "model.lora.save_merged"),
    *("train.stop_at_step", "train.save_every", "train.save_minutes", "train.eval_every"),
    *("train.keep_checkpoints", "train.async_checkpoints", "train.profile", "train.stall_seconds"),
    *("train.best_metric", "train.best_direction", "train.patience"),
    *("parallel.timeout_seconds", "parallel.silence_seconds"),
    *("reference.cache_dir", "reference.offload", "teacher.offload"),
    *("track.to", "track.project", "track.name", "samples.every", "samples.num_completions"),
    *("watch.stop", "watch.patience", "watch.min_entropy", "watch.min_length"),
    *("watch.max_unfinished", "watch.max_repeated", "watch.max_kl"),
}
# Settings with which a run goes on, if not to the bit: one that ran out of memory needs less of
# it, one whose engine is gone samples by another.
GO_ON_DIFFERENTLY = {
    *("sampler", "train.tokens_per_batch", "train.gradient_checkpointing"),
    *("train.max_buffer_bytes", "train.compile", "train.attention"),
    *("parallel.strategy", "parallel.reshard_after_forward"),
    *("parallel.no_sync", "parallel.offload"),
}


def as_yaml(values: dict[str, Any]) -> str:
    """Return the settings as the text of `config.yaml`."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def changed_settings(saved: dict[str, Any], values: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a resumed run's settings with the saved ones.

    A change reads `optim.lr (1e-06, now 2e-06)`.

    Returns:
        Changes that are refused, and changes under which the run continues, if not bitwise.
    """
    before, now = flat_settings(saved), flat_settings(values)
    metrics = [settings.get("train.best_metric") for settings in (before, now)]
    # Values of a metric on other data cannot be compared with the best of before.
    compared = {"data.eval"} if metrics[0] is not None and metrics[0] == metrics[1] else set()
    refused: list[str] = []
    differently: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        # Of an engine: where it is, how long it may take.
        of_engine = name.startswith("vllm.") and name != "vllm.overlap"
        may_change = (name in MAY_CHANGE or of_engine) and name not in compared
        if may_change or before.get(name) == now.get(name):
            continue
        change = f"{name} ({before.get(name)}, now {now.get(name)})"
        (differently if name in GO_ON_DIFFERENTLY else refused).append(change)
    return refused, differently


def has_steps(folder: Path) -> bool:
    """Return whether a run logged a step there, or saved one."""
    metrics = folder / METRICS
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or bool(list_checkpoints(folder / CHECKPOINTS))


def never_saved(folder: Path) -> bool:
    """Return whether nothing can be lost by a run that begins there: no checkpoint, no model."""
    models = any((folder / name).exists() for name in FINAL_MODELS)
    return not models and not list_checkpoints(folder / CHECKPOINTS)


def check_run_folder(folder: Path, values: dict[str, Any], *, resume: bool) -> None:
    """Check that a run can begin in the folder, or that it holds the run that is to be resumed.

    Raises:
        ValueError: if the folder holds a run that saved something and `resume` is False, or if
            `resume` is True and it holds no run, or one with other settings.
    """
    config = folder / CONFIG
    if resume:
        if not config.is_file():
            raise ValueError(f"run.resume: {folder} holds no run to resume (no config.yaml)")
        saved = read_yaml_file(config)
        if not isinstance(saved, dict):
            raise ValueError(f"{config}: damaged: expected sections, got {type(saved).__name__}")
        refused, differently = changed_settings(saved, values)
        if refused:
            raise ValueError(
                f"run.resume: these settings differ from the run's: {', '.join(refused)}"
            )
        if differently:
            print(
                "resumed with other settings, with which it does not end with the bits of a run "
                f"without a stop: {', '.join(differently)}"
            )
    elif has_steps(folder) and not never_saved(folder):
        raise ValueError(
            f"run.dir: {folder} holds another run; add --run.resume to go on with it, or choose "
            "another folder"
        )
    elif not values["run"]["overwrite"]:
        check_names_are_free(folder)
    folder.mkdir(parents=True, exist_ok=True)


def begin_in_folder(folder: Path, values: dict[str, Any], run: RunConfig) -> datetime:
    """Write the settings of a run that begins; move aside the metrics of one that never saved.

    Called with the folder's lock, on a folder that `check_run_folder` has passed. Returns when the
    run began, which chat templates with a date are given.
    """
    for name in (MACHINE_FILE, CONFIG, BEGAN_FILE, SOURCES_FILE):
        clear_half_written(folder / name)
    write_machine(folder, values["train"])  # first: by it the rest is known to be a run's
    if run.export is None and never_saved(folder):
        if has_steps(folder):
            taken = (f"{METRICS}.{number}" for number in itertools.count(1))
            aside = next(name for name in taken if not (folder / name).exists())
            (folder / METRICS).rename(folder / aside)
            if (folder / SAMPLES).exists():
                (folder / SAMPLES).rename(folder / aside.replace(METRICS, SAMPLES))
            print(
                f"the run in {folder} ended before its first checkpoint: it begins again at the "
                f"first step; its metrics are moved to {aside}"
            )
        elif run.resume:
            print(f"{folder} has no checkpoint yet: the run begins at its first step")
    if not run.resume:
        write_atomically(folder / CONFIG, as_yaml(values))
        write_atomically(folder / BEGAN_FILE, f"{datetime.now().isoformat()}\n")
    return when_begun(folder)


BEGAN_FILE = "began.txt"
SOURCES_FILE = "sources.json"


def write_sources(folder: Path, data: Any, held_out: Any) -> None:
    """Write what each source is in the run's data to `sources.json`, if they know their sources."""
    train, others = (
        [asdict(part) for part in getattr(each, "parts", ())] for each in (data, held_out)
    )
    total = sum(part["num_drawn"] for part in train)
    for part in train:
        part["share"] = part["num_drawn"] / total
    for part in others:
        del part["weight"], part["num_drawn"]
    if train:
        text = json.dumps({"train": train, "eval": others}, indent=1) + "\n"
        write_atomically(folder / SOURCES_FILE, text)


def when_begun(folder: Path) -> datetime:
    """Return when the run in a folder began; without a record when its settings were written.

    A damaged record is a ValueError.
    """
    record = folder / BEGAN_FILE
    if not record.exists():
        return datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime)
    try:
        return datetime.fromisoformat(record.read_text(encoding="utf-8").strip())
    except ValueError as error:
        raise ValueError(f"{record}: expected a date and time: {error}") from None


def check_names_are_free(folder: Path) -> None:
    """Raise ValueError if a folder without a run's `machine.json` holds what a run writes to."""
    if run_of(folder) is not None:
        return
    found = next((name for name in WRITTEN if (folder / name).exists()), None)
    if found is not None:
        raise ValueError(
            f"run.dir: {folder / found} exists, and no run of fastalign made it; choose another "
            "folder (--run.overwrite writes to it)"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; raise ValueError if another one is training in it."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"run.dir: another process is training in {folder}") from error
        yield


MACHINE_FILE = "machine.json"
# What a run writes to its folder, beside the models of its end.
WRITTEN = (
    *(MACHINE_FILE, CONFIG, BEGAN_FILE, SOURCES_FILE, METRICS, SAMPLES),
    *(CHECKPOINTS, NOTES, "tensorboard", "wandb", "profile"),
)


def run_of(folder: Path) -> str | None:
    """Return the name by which a run marks what it makes; None if the folder holds no run."""
    try:
        found = json.loads((folder / MACHINE_FILE).read_text(encoding="utf-8"))
        return str(found.get("run", "")) if "fastalign" in found else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def tracked_run(config: TrainingConfig, step: int) -> TrackedRun:
    """Return what trackers are given of the run in a folder, which has taken `step` steps."""
    folder = Path(config.run.dir)
    key = run_of(folder)
    assert key, "the folder of a run that has begun"
    begun_again = len(list(folder.glob(f"{METRICS}.*")))  # each time is another run to a tracker
    return TrackedRun(
        folder,
        f"{key}-{begun_again}" if begun_again else key,
        config.track.name or folder.resolve().name,
        config.track.project,
        flat_settings(config_to_dict(config)),
        step,
    )


def write_machine(folder: Path, train: dict[str, Any]) -> None:
    """Write device, host, number of processes, dtype and versions to `machine.json`.

    Of a checkout of fastalign it holds the commit, too, and of every run a random name (`run`),
    which a resumed run keeps. `train` are the run's settings of that name.
    """
    device = find_device(train["device"], "train.device")
    on_gpu = device.type == "cuda"
    bf16 = train["precision"] == "bf16" or (train["precision"] == "auto" and on_gpu)
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu {platform.machine()}",
        "num_processes": world_of_environment().size,
        "products": "bfloat16" if bf16 else "float32",
        "torch": torch.__version__,
        "fastalign": version("fastalign"),
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "host": platform.node(),
        "run": run_of(folder) or secrets.token_hex(8),
    }
    write_atomically(folder / MACHINE_FILE, json.dumps(found, indent=1) + "\n")


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a git checkout; None if the folder, as of an installed one, is none."""
    git = checkout / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
