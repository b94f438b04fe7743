"""A small share of the fuzz, and that each part of it finds what it looks for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastalign.cli import data
from fastalign.data import readers
from tests.fuzz import data_files
from tests.fuzz.__main__ import NUMBERS, families, run

SHARE = {"files": 150, "settings": 12, "kills": 1}
Families = dict[str, Callable[[int], str]]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield families(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("family", NUMBERS)
def test_a_share_of_the_cases_ends_well(stages: Families, family: str) -> None:
    ends, failures = run(family, stages[family], range(SHARE[family]))
    assert failures == []
    assert ends.total() == SHARE[family]
    assert family == "kills" or len(ends) > 1


def test_a_seed_is_one_file() -> None:
    assert [data_files.make_case(seed) for seed in range(30)] == [
        data_files.make_case(seed) for seed in range(30)
    ]


def test_a_row_that_is_lost_and_a_traceback_are_found(
    stages: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = readers.rows.jsonl_rows
    monkeypatch.setattr(readers.rows, "jsonl_rows", lambda path: list(plain(path))[:-1])
    _, failures = run("files", stages["files"], range(40))
    assert any("rows there" in failure for failure in failures)

    def fail(path: Path) -> None:
        raise KeyError(path)

    monkeypatch.setattr(readers.rows, "jsonl_rows", fail)
    assert any("KeyError" in f for f in run("files", stages["files"], range(40))[1])
    monkeypatch.setattr(data, "read_examples", fail)
    assert len(run("files", stages["files"], range(3))[1]) == 3
