"""The benchmark times nothing that is wrong, and its tables stay readable."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare, head_rows, tune
from benchmarks.heads import HeadCase, HeadInputs, eager_dpo, fastalign_dpo, make_inputs
from benchmarks.measure import ALLOCATORS, MAX_REPEATS, GpuTimer, Measurement, Prepared, measure
from benchmarks.peers import usable_peers
from fastalign.ops.triton_table import (
    PRODUCT,
    Configuration,
    read_products,
    read_table,
)

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


def test_a_peer_that_fails_is_named_and_the_rest_runs(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(CASE, "cpu", torch.float32)

    def fails(inputs: HeadInputs) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def fails_backward(inputs: HeadInputs) -> torch.Tensor:
        return eager_dpo(inputs).detach()

    functions = {"eager": eager_dpo, "one": fails, "other": fails_backward, "third": eager_dpo}
    assert list(head_rows.agreeing(CASE, inputs, functions)) == ["eager", "third"]
    out = capsys.readouterr().out
    assert "not timed: small: one fails: no kernel image" in out
    assert "not timed: small: other fails: element 0 of tensors does not require grad" in out


def test_a_torch_without_a_peer_leaves_it_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    usable, reasons = usable_peers("head", "cpu", ["torch.compile", "torch lce"])
    assert list(usable) == ["torch.compile"]
    assert "LinearCrossEntropyOptions" in reasons["torch lce"]


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


def test_a_table_is_made_under_each_setting_of_the_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process that starts with its settings; their rows go into one file."""

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        flag, name, _, file = command[-4:]
        assert flag == "--allocator"
        kept = {key: env[key] for key in env if key.startswith("MALLOC_")}
        assert kept == ALLOCATORS[name]
        Path(file).write_text(json.dumps([{"allocator": name}]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # the user's own is no setting of a table
    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["compare", "growth", "--json", str(file)])
    compare.main()
    assert json.loads(file.read_text()) == [{"allocator": name} for name in ("default", "keep")]


@pytest.mark.parametrize(
    ("name", "passes", "expected"),
    [
        ("head", (), list(head_rows.PASSES)),
        ("dpo-loss", (), ["forward+backward"]),
        ("head", ("forward+backward",), ["forward+backward"]),
    ],
)
def test_only_the_passes_that_are_asked_for_are_timed(
    name: str, passes: tuple[str, ...], expected: list[str]
) -> None:
    rows = head_rows.compare_case(name, CASE, "cpu", "float32", 1, {"eager": eager_dpo}, passes)
    assert [row.pass_ for row in rows] == expected


def test_nothing_is_timed_where_fastalign_differs() -> None:
    inputs = make_inputs(CASE, "cpu", torch.float32)
    functions = {"eager": eager_dpo, "fastalign": lambda i: 1.01 * fastalign_dpo(i)}
    with pytest.raises(SystemExit, match="small: fastalign differs from eager"):
        head_rows.agreeing(CASE, inputs, functions)


def test_a_red_test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_rows.TESTS, "cpu", ["tests/no_such_test.py"])
    with pytest.raises(SystemExit, match="nothing is timed"):
        head_rows.refuse_on_a_red_test("cpu")


def test_on_a_gpu_its_own_tests_are_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], str | None]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        ran.append((command, options["env"].get("FASTALIGN_TEST_GPU")))
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("FASTALIGN_TEST_GPU", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    for device in ("cuda", "cpu"):
        head_rows.refuse_on_a_red_test(device)
    (on_gpu, on_cpu), root = ran, head_rows.ROOT
    assert on_gpu == ([sys.executable, "-m", "pytest", "-q", "-x", *head_rows.TESTS["cuda"]], "1")
    assert on_cpu[1] is None
    for device, tests in head_rows.TESTS.items():
        assert all((root / test).exists() for test in tests)
        assert all(test.startswith("tests/gpu/") == (device == "cuda") for test in tests)


def test_every_call_is_timed_in_every_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("one", "two")}
    assert measure(calls, "cpu", num_rounds=3).keys() == calls.keys()
    assert order == ["one", "two"] * 4  # once to warm up, then interleaved


class FakeGpu:
    """A GPU that works off calls in order, and whose clock runs only while it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds = 0.0
        self.flushed = 0
        gpu = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.milliseconds

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def zero_(self) -> None:
        """In the place of the buffer that is larger than the L2 cache."""
        self.flushed += 1
        self.milliseconds += 0.1

    def work(self, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.milliseconds += milliseconds

        return run


def test_a_gpus_calls_are_timed_by_its_events_over_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    short, long = gpu.work(0.05), gpu.work(30.0)
    prepared = Prepared(gpu.work(500.0), lambda _: gpu.work(4.0)())
    calls = {"short": short, "long": long, "prepared": prepared}
    found = measure(calls, "cpu", num_rounds=2, timer=GpuTimer(gpu))  # type: ignore[arg-type]
    milliseconds = {name: one.milliseconds for name, one in found.items()}
    assert milliseconds == pytest.approx({"short": 0.05, "long": 30.0, "prepared": 4.0})
    # a first call of each, which says how often a round of 20 ms repeats it
    assert gpu.flushed == 3 + 2 * (MAX_REPEATS + 1 + 5)


def test_tuning_writes_a_table_that_the_kernels_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"head_tile_kernel": Configuration(90, 2048, 16, "a GPU")}
    best = tune.product_candidates(90, "a GPU")[0]
    table = tune.merged({**read_table(), PRODUCT: read_products()}, {**found, PRODUCT: best})
    tune.write_table(table, tmp_path / "table.json")
    monkeypatch.setattr("fastalign.ops.triton_table.TABLE", tmp_path / "table.json")
    written = read_table.__wrapped__()
    assert written.keys() == read_table().keys()
    assert [entry.from_capability for entry in written["head_tile_kernel"]] == [90, 80]
    assert written["head_tile_kernel"][0] == found["head_tile_kernel"]
    products = [entry for entry in read_products() if entry not in table[PRODUCT]]
    assert [(one.from_capability, one.element_bytes) for one in products] == [(90, 2)]
    assert best in read_products.__wrapped__()
    again = tune.merged(written, {"head_tile_kernel": Configuration(90, 1024, 4, "a GPU")})
    assert [entry.block for entry in again["head_tile_kernel"]] == [4096, 1024]
    assert json.loads((tmp_path / "table.json").read_text())


def test_auto_prefers_a_product_that_is_faster_than_the_library() -> None:
    candidates, before = tune.product_candidates(90, "a GPU"), list(read_products())
    ran = []

    def call(backend: str) -> None:
        ran.append((backend, read_products()[0].block_columns, read_products()[0].preferred))

    def timer(library: float) -> Callable[..., dict[str, Measurement]]:
        def measured(calls: dict[str, Callable[[], object]]) -> dict[str, Measurement]:
            for one in calls.values():
                one()
            times = {name: float(abs(7 - int(name)) + 5) for name in calls if name != "library"}
            return {
                name: Measurement(milliseconds, 0.0, None)
                for name, milliseconds in {"library": library, **times}.items()
            }

        return measured

    assert tune.fastest_product(candidates, call, timer(5.5)) == replace(
        candidates[7], preferred=True
    )
    assert tune.fastest_product(candidates, call, timer(4.5)) == candidates[7]
    assert ran[0] == ("auto", 256, False)
    assert {columns for name, columns, _ in ran if name == "epilogue"} == {256, 128}
    assert read_products() == before
