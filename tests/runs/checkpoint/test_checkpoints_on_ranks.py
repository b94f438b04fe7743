"""Checkpoints of several ranks: saved on two, loaded on any number, sharded or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.runs.checkpoint.restore import restore
from fastalign.runs.checkpoint.writer import list_checkpoints
from tests import rank_processes as ranks
from tests.runs.checkpoint.checkpoint_cases import (
    all_of,
    fill_the_disk_of_one,
    load_on_ranks,
    make_state,
    save_on_ranks,
)

LESS = "saved on 2 ranks, resumed on {}: the run goes on, but not to the bit"


def assert_same(noted: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    names = {name for name in noted if not name.startswith(("random.", "draw"))}
    assert {name.split(".")[0] for name in names} == {"model", "optimizer", "reference"}
    assert names <= loaded.keys()
    assert all(torch.equal(noted[name], loaded[name]) for name in names)


@pytest.mark.parametrize(
    ("sharded", "sizes"), [(True, (2, 3)), (False, (2,))], ids=["fsdp2", "replicas"]
)
def test_saved_on_two_ranks_and_loaded_on_any_number_sharded_or_not(
    tmp_path: Path, sharded: bool, sizes: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.run(2, tmp_path / "logs", save_on_ranks, tmp_path, sharded)
    noted = [load_file(tmp_path / f"noted-{rank}.safetensors") for rank in range(2)]
    (newest, _) = list_checkpoints(tmp_path / "checkpoints")
    assert len(list(newest.glob("*.safetensors"))) == 2

    alone = make_state(seed=1)
    assert restore(newest, alone)["world_size"] == 2
    assert_same(noted[0], all_of(alone))
    assert alone.kept == {"coefficient": pytest.approx(0.4)}
    assert capsys.readouterr().out.count(LESS.format(1)) == 1

    for size in sizes:
        said = ranks.run(size, tmp_path / "logs", load_on_ranks, tmp_path)
        assert "".join(said).count(LESS.format(size)) == (0 if size == 2 else 2)
        for again in (False, True):
            files = [f"loaded-{size}-{again}-{rank}.safetensors" for rank in range(size)]
            loaded = [load_file(tmp_path / file) for file in files]
            draws = [values["draw"] for values in loaded]
            for values in loaded:
                assert_same(noted[0], values)
            for rank in range(2):
                assert torch.equal(noted[rank]["draw"], draws[rank])
            assert len({tuple(draw.tolist()) for draw in draws}) == size


def test_a_full_disk_of_one_rank_is_told_to_all_and_all_agree_on_what_is_good(
    tmp_path: Path,
) -> None:
    ranks.run(2, tmp_path / "logs", fill_the_disk_of_one, tmp_path)
    newest, older = list_checkpoints(tmp_path / "checkpoints")
    shard = max(newest.glob("*.safetensors"))
    fault = f"{newest}: {shard.name} is damaged (its SHA-256 differs)"
    for rank in range(2):
        told, chosen = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert "step-000004 was not written (rank 1): File too large; older" in told
        assert chosen == [
            [older.name, []],
            [older.name, []],
            [newest.name, []],
            [older.name, [fault]],
        ]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [older.name, newest.name] == ["step-000003", "step-000005"]
