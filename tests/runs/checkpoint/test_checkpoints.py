"""Checkpoints of one process: whole or not there, written beside training, refused by name."""

import json
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastalign.runs.checkpoint import writer as checkpoint_writer
from fastalign.runs.checkpoint.restore import fault_of, newest_good_checkpoint, restore
from fastalign.runs.checkpoint.writer import CheckpointWriter, ShardWriter, list_checkpoints
from tests import rank_processes as ranks
from tests.runs.checkpoint import checkpoint_killer
from tests.runs.checkpoint.checkpoint_cases import (
    all_of,
    flip_last_byte,
    make_state,
    saved,
    take_steps,
    trained,
)
from tests.small_runs import saved_tensors

BACKGROUND = pytest.mark.parametrize("background", [True, False], ids=["background", "blocking"])


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A write beyond it fails with EFBIG, as one on a full disk does with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@BACKGROUND
def test_what_is_saved_is_restored_to_the_bit(tmp_path: Path, background: bool) -> None:
    state = trained()
    path = saved(tmp_path, state, background=background)
    noted, draw = all_of(state), torch.rand(3)
    other = make_state(seed=1)
    assert restore(path, other)["metrics_bytes"] == 7
    assert torch.equal(torch.rand(3), draw)
    restore(path, other)
    found = all_of(other)
    assert found.keys() == noted.keys()
    assert all(torch.equal(found[name], noted[name]) for name in noted)
    assert other.counters() == state.counters()
    assert other.rollouts == state.rollouts
    assert fault_of(path) is None
    # Nothing in it that could be a pickle.
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, plain = threading.Event(), ShardWriter.write_data

    def wait(self: ShardWriter, *arguments: Any) -> Any:
        assert go_on.wait(60)
        return plain(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write_data", wait)
    state = trained()
    noted = all_of(state)
    writer = CheckpointWriter(tmp_path, keep=2)
    path = writer.save(state, {})
    take_steps(state, 2)
    state.reference["0.bias"].zero_()
    state.grad_norms.append(0.9)
    writer.check()
    assert not path.exists()
    go_on.set()
    writer.finish()
    found = saved_tensors(path)
    counters = json.loads((path / "state.json").read_text())
    assert counters["step"] == 3
    assert counters["kept"] == {"coefficient": 0.1 * 3}
    assert counters["grad_norms"] == [0.1, 0.3]
    assert not torch.equal(all_of(state)["model.0.bias"], noted["model.0.bias"])
    assert all(torch.equal(found[name], noted[name]) for name in noted)


@BACKGROUND
@pytest.mark.parametrize("where", ["check", "save", "finish", "close"])
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    tmp_path: Path, background: bool, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = trained()
    older = saved(tmp_path, state)
    take_steps(state, 1)
    writer = CheckpointWriter(tmp_path, keep=1, background=background)

    def until_told() -> None:
        with files_of_at_most(4096):
            writer.save(state, {})
            while where == "check":
                writer.check()
            if where == "close":
                return writer.close()
            if where == "finish":
                writer.finish()
            writer.save(state, {})

    line = r"^checkpoint .*step-000004 was not written: File too large; older checkpoints are unt"
    if where == "close" and background:
        until_told()
        assert "step-000004 was not written: File too large" in capsys.readouterr().out
    else:
        with pytest.raises(OSError, match=line):
            until_told()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert newest_good_checkpoint(tmp_path) == (older, [])
    assert saved(tmp_path, state).name == "step-000004"
    assert fault_of(tmp_path / "step-000004") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", ["*.safetensors", "state.json", "rollouts.json", "manifest.json"])
def test_every_damage_is_named_and_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    state = trained()
    older = saved(tmp_path, state)
    take_steps(state, 1)
    newer = saved(tmp_path, state)
    (path,) = newer.glob(file)
    if damage == "flip":
        flip_last_byte(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    (newer.parent / ".writing-step-000005").mkdir()
    checkpoint, (fault,) = newest_good_checkpoint(tmp_path)
    assert checkpoint == older
    what = {"flip": "is damaged", "truncate": r"has \d+ bytes, expected", "delete": "is missing"}
    expected = "is damaged" if (file, damage) == ("manifest.json", "truncate") else what[damage]
    assert re.match(f"{newer}: {path.name} {expected}", fault)


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    plain_sync, plain_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        plain_sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def rename(source: Path, target: Path) -> None:
        files = {path.name: path.stat().st_ino for path in (source, *source.iterdir())}
        assert "manifest.json" in files
        assert not [name for name, place in files.items() if place not in synced]
        synced.clear()
        plain_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    saved(tmp_path)
    assert synced == [tmp_path.stat().st_ino]


def test_a_file_that_the_manifest_does_not_list_is_a_fault(tmp_path: Path) -> None:
    path = saved(tmp_path)
    save_file({"model.0.bias": torch.zeros(7)}, path / "more.safetensors")
    assert fault_of(path) == "more.safetensors is not in manifest.json"
    (path / "more.safetensors").unlink()
    for missing in ("state.json", ".safetensors"):
        manifest = json.loads((path / "manifest.json").read_text())
        kept = {name: entry for name, entry in manifest.items() if not name.endswith(missing)}
        for shard in path.glob(f"*{missing}"):
            shard.rename(path / f"{shard.name}.away")
        (path / "manifest.json").write_text(json.dumps(kept))
        assert missing in str(fault_of(path))
        for shard in path.glob("*.away"):
            shard.rename(path / shard.stem)
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert fault_of(path) is None


@pytest.mark.parametrize("part", ["weight", "reference"])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path, part: str) -> None:
    state = trained()
    values = state.reference if part == "reference" else dict(state.model.named_parameters())
    values["2.weight"].data[0, 3] = torch.inf
    with pytest.raises(ValueError, match=r"2\.weight holds a non-finite weight"):
        saved(tmp_path / "checkpoints", state)
    assert not (tmp_path / "checkpoints").exists()


def test_the_one_of_the_same_step_is_replaced_and_a_newer_damaged_one_costs_none(
    tmp_path: Path,
) -> None:
    damaged = saved(tmp_path, trained(count=6))
    (damaged / "manifest.json").unlink()
    for seed in (0, 1):
        state = trained(seed)
        writer = CheckpointWriter(tmp_path, keep=1)
        path = writer.save(state, {})
        writer.finish()
        assert newest_good_checkpoint(tmp_path)[0] == path
        assert torch.equal(saved_tensors(path)["model.0.bias"], all_of(state)["model.0.bias"])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000007", "step-000003"]


def test_large_states_are_written_in_more_than_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "SMALLEST_FILE_BYTES", 300)
    state = trained()
    path = saved(tmp_path, state)
    assert len(list(path.glob("*.safetensors"))) > 3
    other = make_state(seed=1)
    restore(path, other)
    noted, found = all_of(state), all_of(other)
    assert all(torch.equal(found[name], noted[name]) for name in noted)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_file_operation_leaves_a_good_checkpoint(
    tmp_path: Path,
) -> None:
    (out,) = ranks.run(1, tmp_path / "logs", checkpoint_killer.main, tmp_path)
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 4
    assert all(kind["operations"] > 20 for kind in found)
    assert [kind["faults"] for kind in found] == [[], [], [], []]
