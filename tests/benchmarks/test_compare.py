"""The benchmark times nothing that is wrong, and its tables stay readable."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import head_rows, tune
from benchmarks.heads import HeadCase, eager_dpo, fastalign_dpo, make_inputs
from benchmarks.measure import measure
from fastalign.ops.triton_table import Configuration, read_table

CASE = HeadCase("small", 16, 8, 50, 2)


def test_a_peer_that_differs_is_named_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(CASE, "cpu", torch.float32)
    functions = {
        "eager": eager_dpo,
        "fastalign": fastalign_dpo,
        "wrong": lambda i: 1.01 * eager_dpo(i),
    }
    assert list(head_rows.agreeing(CASE, inputs, functions)) == ["eager", "fastalign"]
    assert "not timed: small: wrong differs from eager by 1.00e-02" in capsys.readouterr().out


class OneCall:
    """In the place of pytest-benchmark's fixture: calls once."""

    group = ""

    def pedantic(self, function: Callable[..., object], args: tuple[object, ...], **_: int) -> None:
        function(*args)


def test_the_pytest_suite_runs() -> None:
    """Its import imports the peers, TRL among them: collecting tests need not wait for that."""
    from benchmarks import test_heads

    assert {("head", "fastalign"), ("head", "trl"), ("head", "liger")} <= set(test_heads.CALLS)
    for name, implementation in test_heads.CALLS:
        test_heads.test_head(OneCall(), CASE, name, implementation)
    test_heads.test_products(OneCall(), CASE)


def test_nothing_is_timed_where_fastalign_differs() -> None:
    inputs = make_inputs(CASE, "cpu", torch.float32)
    functions = {"eager": eager_dpo, "fastalign": lambda i: 1.01 * fastalign_dpo(i)}
    with pytest.raises(SystemExit, match="small: fastalign differs from eager"):
        head_rows.agreeing(CASE, inputs, functions)


def test_a_red_test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rows, "TESTS", ["tests/no_such_test.py"])
    with pytest.raises(SystemExit, match="nothing is timed"):
        head_rows.refuse_on_a_red_test()


def test_every_call_is_timed_in_every_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("one", "two")}
    assert measure(calls, "cpu", num_rounds=3).keys() == calls.keys()
    assert order == ["one", "two"] * 4  # once to warm up, then interleaved


def test_tuning_writes_a_table_that_the_kernels_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"head_tile_kernel": Configuration(90, 2048, 16, "a GPU")}
    table = tune.merged(read_table(), found)
    tune.write_table(table, tmp_path / "table.json")
    monkeypatch.setattr("fastalign.ops.triton_table.TABLE", tmp_path / "table.json")
    written = read_table.__wrapped__()
    assert written.keys() == read_table().keys()
    assert [entry.from_capability for entry in written["head_tile_kernel"]] == [90, 80]
    assert written["head_tile_kernel"][0] == found["head_tile_kernel"]
    again = tune.merged(written, {"head_tile_kernel": Configuration(90, 1024, 4, "a GPU")})
    assert [entry.block for entry in again["head_tile_kernel"]] == [4096, 1024]
    assert json.loads((tmp_path / "table.json").read_text())
