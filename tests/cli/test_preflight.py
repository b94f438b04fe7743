"""The pre-flight check with real processes: what it finds, that all leave with one verdict."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.main import main
from fastalign.cli.preflight import faults_of
from tests.rank_processes import free_port

ROOT = Path(__file__).parents[2]
Found = list[tuple[int, str, str]]
RunRanks = Callable[..., Found]


def rank_of(
    rank: int, size: int, port: int, folder: Path, *more: str, seconds: str = "60", **others: Any
) -> dict[str, Any]:
    settings = ["--model.path", "m", "--data.train", "d", "--run.dir", str(folder)]
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(others.get("local_rank", rank)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {
        "arguments": ["--timeout-seconds", seconds, "dpo", *settings, *more],
        "environment": environment | others.get("environment", {}),
        "versions": others.get("versions", {}),
    }


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[RunRanks]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.preflight_ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    questions, answers = server.stdin, server.stdout

    def run(*ranks: dict[str, Any]) -> Found:
        print(json.dumps(ranks), file=questions, flush=True)
        return [tuple(rank) for rank in json.loads(answers.readline())]

    yield run
    with server:
        questions.close()
    assert server.returncode == 0


def codes(found: Found) -> list[int]:
    return [code for code, _, _ in found]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_can_run_together_pass_and_leave_nothing_behind(
    size: int, run_ranks: RunRanks, tmp_path: Path
) -> None:
    port = free_port()
    found = run_ranks(*(rank_of(rank, size, port, tmp_path / "a/b") for rank in range(size)))
    assert codes(found) == [0] * size, found
    assert f"{size} of {size} ranks are ready" in found[0][1]
    rows = [line for line in found[0][1].splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in rows] == [str(rank) for rank in range(size)]
    assert [(out, err) for _, out, err in found[1:]] == [("", "")] * (size - 1)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come_is_named_in_time(run_ranks: RunRanks, tmp_path: Path) -> None:
    port = free_port()
    start = time.monotonic()
    found = run_ranks(*(rank_of(rank, 3, port, tmp_path, seconds="8") for rank in (0, 2)))
    assert time.monotonic() - start < 60
    assert codes(found) == [2, 2]
    (line,) = found[0][2].splitlines()
    host = socket.gethostname()
    assert line == (
        "fastalign preflight: rank 1 of 3 did not come in 4 seconds; here: ranks 0, 2 on " + host
    )


def test_rank_0_that_does_not_come_is_named(run_ranks: RunRanks, tmp_path: Path) -> None:
    port = free_port()
    found = run_ranks(*(rank_of(rank, 3, port, tmp_path, seconds="2") for rank in (1, 2)))
    assert codes(found) == [2, 2]
    for number, (_, _, said) in enumerate(found, 1):
        assert f"rank {number} of 3 on {socket.gethostname()} does not reach rank 0 at" in said
        assert len(said.splitlines()) == 1


def test_a_folder_that_is_not_shared_is_named_with_who_does_not_see_it(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    port = free_port()
    folders = [tmp_path / "disk-a", tmp_path / "disk-a", tmp_path / "disk-b"]
    found = run_ranks(
        *(rank_of(rank, 3, port, folder) for rank, folder in enumerate(folders)),
    )
    assert codes(found) == [2, 2, 2]
    (line,) = found[0][2].splitlines()
    host = socket.gethostname()
    assert f"rank 2 on {host}: run.dir: {folders[2]} is not shared: it does not hold" in line
    assert found[1][2] == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(run_ranks: RunRanks, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    found = run_ranks(*(rank_of(rank, 2, port, folder) for rank in range(2)))
    assert codes(found) == [2, 2]
    assert f"run.dir: {folder} cannot be written (Not a directory)" in found[0][2]


@pytest.mark.parametrize("package", ["torch", "fastalign", "transformers"])
def test_another_version_is_named(package: str, run_ranks: RunRanks, tmp_path: Path) -> None:
    port = free_port()
    ranks = [rank_of(rank, 2, port, tmp_path) for rank in range(2)]
    ranks[1]["versions"] = {package: "0.0.7"}
    found = run_ranks(*ranks)
    assert codes(found) == [2, 2]
    host = socket.gethostname()
    assert f"{package}: " in found[0][2]
    assert f" on rank 0 on {host}, but 0.0.7 on rank 1 on {host}" in found[0][2]


def test_other_settings_and_another_world_size_are_named(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    port = free_port()
    more: list[tuple[str, ...]] = [(), ("--optim.lr", "2e-6")]
    found = run_ranks(*(rank_of(rank, 2, port, tmp_path, *more[rank]) for rank in range(2)))
    assert codes(found) == [2, 2]
    assert "optim.lr: 1e-06 on rank 0" in found[0][2]
    assert "but 2e-06 on rank 1" in found[0][2]
    port = free_port()
    found = run_ranks(rank_of(0, 2, port, tmp_path), rank_of(1, 3, port, tmp_path))
    assert codes(found) == [2, 2]
    assert "WORLD_SIZE: 2 on rank 0" in found[0][2]


def test_a_port_that_is_taken_is_named_and_nobody_hangs(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        found = run_ranks(*(rank_of(rank, 2, port, tmp_path, seconds="3") for rank in range(2)))
    assert codes(found) == [2, 2]
    assert f"MASTER_PORT: rank 0 on {socket.gethostname()} cannot listen at {port}" in found[0][2]
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in found[1][2]


def test_each_machine_says_a_verdict_once(run_ranks: RunRanks, tmp_path: Path) -> None:
    port = free_port()
    places = [0, 1, 0, 1]  # two machines of two ranks
    ranks = [
        rank_of(rank, 4, port, tmp_path, local_rank=place) for rank, place in enumerate(places)
    ]
    ranks[3]["versions"] = {"torch": "1.0"}
    said = [err for _, _, err in run_ranks(*ranks)]
    assert [len(err.splitlines()) for err in said] == [1, 0, 1, 0]
    assert said[0] == said[2]


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"MASTER_PORT": "port"}, "MASTER_PORT: expected a port from 1 to 65535, got 'port'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: expected the name or address"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR: no-such-host.invalid has no addr"),
        ({"RANK": "x"}, "RANK: expected a number from torchrun, got 'x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: expected a number from torchrun, got ''"),
    ],
)
def test_a_variable_that_does_not_fit_is_named(
    environment: dict[str, str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rank = rank_of(0, 2, free_port(), tmp_path)
    for name, value in (rank["environment"] | environment).items():
        monkeypatch.setenv(name, value)
    assert main(["preflight", *rank["arguments"]]) == 2
    assert line in capsys.readouterr().err


def test_arguments_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["sft", "--model.path", "m", "--data.train", "d", "--run.dir", "r"]
    for arguments, line in (
        (["--world-size", "4", *run], "--world-size: expected 4 ranks, got 1 (WORLD_SIZE)"),
        (["--timeout-seconds", "0", *run], "--timeout-seconds: expected a positive number, got 0"),
        (["eval"], "expected a command (sft, dpo, kto, online-dpo, reward, ppo, grpo, rloo)"),
        ([*run, "--optim.lr", "-1"], "optim.lr: expected a finite number"),
    ):
        assert main(["preflight", *arguments]) == 2
        assert line in capsys.readouterr().err


def facts(host: str, device: str, gpu: str | None, **others: Any) -> dict[str, Any]:
    found = {"host": host, "device": device, "gpu": gpu, "faults": [], "settings": {}}
    return {
        **found,
        "versions": dict.fromkeys(("torch", "fastalign", "transformers"), "1"),
    } | others


def test_two_ranks_on_one_gpu_are_named() -> None:
    one, two = facts("a", "cuda:0", "GPU-1"), facts("a", "cuda:1", "GPU-2")
    elsewhere = facts("b", "cuda:0", "GPU-3")
    assert faults_of([one, two, elsewhere]) == []
    assert faults_of([one, two, one]) == ["ranks 0, 2 on a have one GPU (cuda:0)"]
    (fault,) = faults_of([one, two, facts("b", "cpu", None)])
    assert fault == "train.device: cuda on rank 0 on a, but cpu on rank 2 on b"
    (fault,) = faults_of([one, two, facts("b", "cpu", None, faults=["no GPU 2"])])
    assert fault == "rank 2 on b: no GPU 2"
