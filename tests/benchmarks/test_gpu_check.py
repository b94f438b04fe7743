"""The stages of `scripts/gpu_check.sh`: no step costs another its results or its time."""

import contextlib
import json
import math
import os
import re
import select
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import carried, shards, synchronisations
from benchmarks.gpu_check.runner import STAGE_SECONDS, ProcessGroup, Record, Stage, Step
from benchmarks.gpu_check.stages import STEPS, without_packages, without_tool
from benchmarks.step_worker import Finished


class FakeMachine:
    """A clock that stands still but while a process runs, and processes of given lengths."""

    def __init__(self, seconds: Mapping[str, float], codes: Mapping[str, int]) -> None:
        self.now = 1000.0
        self.running: list[str] = []
        self.order: list[str] = []
        self._seconds, self._codes = seconds, codes

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], output: Path) -> "FakeProcess":
        self.order.append(output.stem)
        self.running.append(output.stem)
        seconds = self._seconds.get(output.stem, 8.0)
        return FakeProcess(self, output, seconds, self._codes.get(output.stem, 0))


class FakeProcess:
    def __init__(self, machine: FakeMachine, output: Path, seconds: float, code: int) -> None:
        self._machine, self._output, self._seconds, self._code = machine, output, seconds, code

    def wait(self, seconds: float) -> int | None:
        self._output.write_text("first line\nlast line\n")
        if self._seconds > seconds:
            self._machine.now += seconds
            return None
        self._machine.now += self._seconds
        self._output.with_suffix(".rows.json").write_text("[1]")
        return self._code

    def stop(self) -> None:
        self._machine.running.remove(self._output.stem)


def run_stage(
    number: int,
    folder: Path,
    seconds: Mapping[str, float] | None = None,
    codes: Mapping[str, int] | None = None,
) -> tuple[dict[str, Record], FakeMachine]:
    """The records as they are in the folder."""
    machine = FakeMachine(seconds or {}, codes or {})
    steps = [replace(step, missing=lambda: None) for step in STEPS[number]]
    stage = Stage(folder, clock=machine.clock, start=machine.start)
    for record in stage.run(steps):
        assert json.loads((folder / f"{record.step}.json").read_text())["status"] == record.status
    assert not machine.running
    assert machine.now - 1000 <= STAGE_SECONDS
    return {step.name: read(folder, step.name) for step in steps}, machine


def read(folder: Path, name: str) -> Record:
    return Record(**json.loads((folder / f"{name}.json").read_text()))


@pytest.mark.parametrize("number", STEPS)
def test_a_red_and_a_hanging_step_lose_no_other_result(number: int, tmp_path: Path) -> None:
    names = [step.name for step in STEPS[number]]
    for hanging in names:
        folder = tmp_path / hanging
        folder.mkdir()
        red = names[names.index(hanging) - 1]
        records, _ = run_stage(number, folder, {hanging: math.inf}, {red: 1})
        expected = dict.fromkeys(names, "green") | {hanging: "timed out", red: "red"}
        assert {name: record.status for name, record in records.items()} == expected
        for step in STEPS[number]:
            record = records[step.name]
            assert record.allowed_seconds >= step.seconds
            assert record.output.endswith("last line\n")
            assert (record.rows is None) == (step.name == hanging)
            if record.rows is not None:
                assert (folder / record.rows).read_text() == "[1]"


@pytest.mark.parametrize("number", STEPS)
def test_each_step_has_its_share_even_if_all_hang(number: int, tmp_path: Path) -> None:
    endless = {step.name: math.inf for step in STEPS[number]}
    records, machine = run_stage(number, tmp_path, endless)
    assert machine.order == list(endless)
    for step in STEPS[number]:
        record = records[step.name]
        assert record.status == "timed out"
        assert step.seconds <= record.seconds <= step.most


def test_what_others_leave_comes_on_top_of_a_share(tmp_path: Path) -> None:
    records, _ = run_stage(1, tmp_path, {step.name: 0.0 for step in STEPS[1]})
    tests = next(step for step in STEPS[1] if step.name == "kernel-tests")
    later = STEPS[1][STEPS[1].index(tests) + 1 :]
    spare = STAGE_SECONDS - sum(step.seconds for step in later)
    assert records["kernel-tests"].allowed_seconds == min(spare, tests.most)


def test_figures_come_first_where_tests_are_red(tmp_path: Path) -> None:
    names = [step.name for step in STEPS[1]]
    run_stage(1, tmp_path, {"memcheck": math.inf}, {"kernel-tests": 1})
    _, machine = run_stage(1, tmp_path)
    lost = ["memcheck", "kernel-tests"]
    assert machine.order == [name for name in names if name not in lost] + lost
    _, machine = run_stage(1, tmp_path)
    assert machine.order == names


def test_a_step_whose_program_is_missing_is_skipped_by_name(tmp_path: Path) -> None:
    machine = FakeMachine({}, {})
    steps = [
        Step("sanitizer", ("none",), 10, missing=without_tool("no-such-program")),
        Step("peer", ("none",), 10, missing=without_packages("json", "no_such_package")),
        Step("last", ("none",), 10),
    ]
    records = list(Stage(tmp_path, clock=machine.clock, start=machine.start).run(steps))
    assert [record.status for record in records] == ["skipped", "skipped", "green"]
    assert records[0].reason == "no-such-program is not installed"
    assert records[1].reason == "not installed: no_such_package"


def test_a_record_says_that_a_step_runs_until_it_ends(tmp_path: Path) -> None:
    class Dies(FakeMachine):
        def start(self, command: Sequence[str], output: Path) -> FakeProcess:
            assert read(tmp_path, output.stem).status == "running"
            raise KeyboardInterrupt

    machine = Dies({}, {})
    (tmp_path / "one.rows.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        list(Stage(tmp_path, clock=machine.clock, start=machine.start).run([Step("one", (), 1)]))
    assert read(tmp_path, "one").status == "running"
    assert not (tmp_path / "one.rows.json").exists()


def test_a_process_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    output = tmp_path / "output"
    script = "sleep 1000 & echo $!; wait"
    process = ProcessGroup(["bash", "-c", script], output)
    while not (child := output.read_text().strip()):
        assert process.wait(0.01) is None
    ends = os.pidfd_open(int(child))
    process.stop()
    assert select.select([ends], [], [], 60.0)[0]  # readable once it has ended
    os.close(ends)
    finished = ProcessGroup([sys.executable, "-c", "print('said'); raise SystemExit(3)"], output)
    assert finished.wait(60) == 3
    finished.stop()
    assert output.read_text() == "said\n"


def test_the_commands_name_modules_and_files_that_exist() -> None:
    import importlib.util

    names = Counter(step.name for steps in STEPS.values() for step in steps)
    assert {name for name, count in names.items() if count > 1} == {"native"}
    for steps in STEPS.values():
        for step in steps:
            parts = list(step.command)
            module = parts[parts.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None
            for part in parts:
                if part.startswith("tests/"):
                    assert (shards.ROOT / part).exists()


def test_measurements_need_neither_tyro_nor_datasets() -> None:
    modules = {
        part
        for steps in STEPS.values()
        for step in steps
        for part in step.command
        if part.startswith("benchmarks.")
    }
    code = f"import sys; sys.modules.update(dict.fromkeys({['tyro', 'datasets']}))\n"
    code += "".join(f"import {module}\n" for module in sorted(modules))
    subprocess.run([sys.executable, "-c", code], cwd=shards.ROOT, check=True)


def test_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    for arguments, message in (
        (["1"], "--out: expected a folder"),
        (["4", "--out", "x"], "stage: expected one of 1, 2, 3, got 4"),
        (["1", "--out", "x", "--step", "none"], "--step: expected one of"),
        (["1", "--out", "x"], "torch sees no CUDA device here"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit):
            command.main()
        assert message in capsys.readouterr().err  # type: ignore[attr-defined]


TESTS = """
import pytest

@pytest.mark.parametrize("number", range(7))
def test_one(number):
    assert number != 4

def test_skipped():
    pytest.skip("no reason")

def test_that_ends_the_process():
    import os
    os._exit(9)
"""


@pytest.mark.parametrize("xdist", [False, True])
def test_shards_write_each_test_as_it_ends(xdist: bool, tmp_path: Path) -> None:
    file, folder = tmp_path / "test_some.py", tmp_path / "results"
    file.write_text(TESTS)
    folder.mkdir()
    codes = shards.run(["-p", "no:randomly", str(file)], 2, folder, xdist=xdist)
    assert any(codes)
    found = shards.results(folder)
    outcomes = Counter(result["outcome"] for result in found.values())
    assert outcomes == {"passed": 6, "failed": 1, "skipped": 1, "begun": 1}
    (begun,) = (name for name, result in found.items() if result["outcome"] == "begun")
    assert begun.endswith("test_that_ends_the_process")
    (failed,) = (result for result in found.values() if result["outcome"] == "failed")
    assert "assert 4 != 4" in failed["reason"]


def test_what_to_carry_is_named_with_versions() -> None:
    found = dict(line.split("==") for line in carried.wheels())
    assert {"tyro", "docstring-parser", "typeguard", "datasets", "pyarrow", "trl"} <= found.keys()
    assert {"liger-kernel", "cut-cross-entropy", "pytest-timeout"} <= found.keys()
    assert not {"torch", "triton", "transformers", "numpy", "safetensors"} & found.keys()
    assert found["trl"] == carried.pins()["trl"]


def test_the_library_to_carry_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\n".join(carried.library_lines())
    assert "FASTALIGN_CUDA_ARCHITECTURES=90" in said
    if carried.native_library.library_path("cuda").is_file():
        assert re.search(r"libfastalign_cuda.so: [\d.]+ MiB, code for sm_\d+", said)
    monkeypatch.setattr(carried.native_library, "FOLDER", carried.ROOT / "nowhere")
    assert "nowhere/libfastalign_cuda.so: not built here" in "\n".join(carried.library_lines())


def test_synchronisations_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    message = "called a synchronizing CUDA operation"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clock = synchronisations.SynchronisationClock("cpu", caught)
        with contextlib.suppress(Finished):
            while True:
                warnings.warn(message, stacklevel=1)
                warnings.warn("another", stacklevel=1)
                clock.end_turn()
    assert modes == ["warn", "default"]
    counts = synchronisations.counted(caught, synchronisations.COUNTED_TURNS)
    assert list(counts.values()) == [1.0]
    assert next(iter(counts)).startswith("tests/benchmarks/test_gpu_check.py:")
