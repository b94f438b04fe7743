"""Samplers side by side: equal work, checked before and after, and what is not timed is named."""

import copy
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compare, compare_rollouts, rollout_samplers, rollout_worker
from benchmarks.compare_rollouts import measure_samplers
from benchmarks.rollout_cases import CASES, disturb, write_policy
from benchmarks.rollout_rows import Times, print_rollouts, rows_of
from benchmarks.rollout_samplers import (
    EMBEDDED,
    ENGINES,
    PEER,
    PEERS,
    Contestant,
    RolloutJob,
    contestant_of,
    engine_spec,
    open_embedded,
    open_generate,
)
from benchmarks.rollout_worker import Turns, WrongAnswers
from benchmarks.step_cases import EOS
from fastalign.rollouts import SamplingParams, VllmServerSampler
from fastalign.rollouts.engines.server_process import TOKEN_VARIABLE
from tests.rank_processes import CONTEXT
from tests.rollouts.stand_in_server import TOKEN, stand_in_server

CASE = CASES["smallest"]
NUM_TOKENS = 4 * 5
SYNCED = [f"fastalign {name}" for name in ("vllm", "vllm-server")]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="scripts/install_vllm_cpu.sh"
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def job(tmp_path: Path) -> RolloutJob:
    write_policy(CASE.shape, tmp_path / "policy")
    return RolloutJob(CASE, tmp_path / "policy", tmp_path, "cpu", "float32", num_threads=1)


def policy_of(job: RolloutJob) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.folder).eval()


def test_the_policy_never_ends_an_answer(job: RolloutJob) -> None:
    model = policy_of(job)
    for seed in range(3):
        with torch.no_grad():
            probabilities = model(torch.tensor(CASE.prompts())).logits.softmax(-1)
        assert probabilities[..., EOS].max() < 1e-20
        # nor is it sure of anything: a sampler with other weights is found out
        assert probabilities.max() < 0.5
        disturb(model.parameters(), seed)


@pytest.mark.parametrize("opener", [*PEERS.values(), *EMBEDDED.values()], ids=[*PEERS, *EMBEDDED])
def test_samplers_without_an_engine_are_of_the_policy(job: RolloutJob, opener: Any) -> None:
    model = policy_of(job)
    turns = Turns(job, model, opener(job, model))
    assert turns.begin() is None
    assert turns.generate() > 0
    turns.check()


def stale(job: RolloutJob, model: Any) -> Contestant:
    """A sampler that is told of new weights and does not take them."""
    inner = open_embedded(job, copy.deepcopy(model))
    return Contestant(inner.generate, sync=lambda version: None)


def hasty(job: RolloutJob, model: Any) -> Contestant:
    """A sampler that makes a token less than it is asked for, but where it is checked."""
    inner = open_generate(job, model)

    def generate(prompts: Any, params: SamplingParams, seed: int) -> list[list[int]]:
        answers = inner.generate(prompts, params, seed)
        return answers if params.temperature == 0 else [answers[0][:-1], *answers[1:]]

    return Contestant(generate)


def broken(job: RolloutJob, model: Any) -> Contestant:
    raise ValueError("no such thing\nand more")


def test_weights_that_were_not_taken_are_found_after_the_syncs(job: RolloutJob) -> None:
    model = policy_of(job)
    turns = Turns(job, model, stale(job, model))
    weights = sum(parameter.numel() for parameter in model.parameters())
    # float32, and a tied head under its own name
    assert turns.begin() == 4 * (weights + model.lm_head.weight.numel())
    turns.check()
    assert turns.sync() >= 0
    with pytest.raises(WrongAnswers, match="its likeliest tokens are not the policy's"):
        turns.check()


def test_fewer_tokens_are_no_speed(job: RolloutJob) -> None:
    model = policy_of(job)
    with pytest.raises(WrongAnswers, match=r"4 answers of \[4, 5\] tokens, expected 4 of 5"):
        Turns(job, model, hasty(job, model)).begin()


def test_a_peer_that_fails_is_named_and_ours_that_is_wrong_ends_it_all(
    job: RolloutJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes that have imported everything: these samplers are no engines.
    monkeypatch.setattr(rollout_worker.multiprocessing, "get_context", lambda method: CONTEXT)
    found = measure_samplers({"one": stale, "two": broken}, job, num_rounds=1)
    assert found["one"].reason is not None
    assert found["one"].reason.startswith("its likeliest tokens are not the policy's")
    assert found["two"].reason == "ValueError: no such thing"
    rows = rows_of(job, found)
    assert all(row.milliseconds is None and row.tokens_per_second is None for row in rows)
    with pytest.raises(SystemExit, match="smallest: fastalign hasty: it made 4 answers"):
        measure_samplers({"fastalign hasty": hasty}, job, num_rounds=1)


def test_the_numbers_of_a_row(job: RolloutJob, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        PEER: Times(generate=[4.0, 1.0, 2.0], peak_bytes=2**20),
        "fastalign vllm": Times(num_bytes=3000, generate=[0.5], sync=[0.1, 0.3, 0.2]),
        "fastalign vllm-server": Times(reason="it is not there"),
    }
    rows = rows_of(job, found)
    peer, ours, missing, sync = rows
    assert (peer.milliseconds, peer.spread, peer.peak_bytes) == (2000.0, 1.5, 2**20)
    assert (peer.tokens, peer.tokens_per_second, peer.ratio_to_peer) == (NUM_TOKENS, 10.0, 1.0)
    assert (ours.tokens_per_second, ours.ratio_to_peer, ours.bytes) == (40.0, 4.0, None)
    assert (missing.milliseconds, missing.ratio_to_peer) == (None, None)
    assert (sync.pass_, sync.implementation, sync.bytes) == ("sync", "fastalign vllm", 3000)
    assert sync.milliseconds == 200.0
    assert sync.bytes_per_second == 15000.0
    assert (sync.tokens, sync.tokens_per_second, sync.ratio_to_peer) == (None, None, None)
    print_rollouts(rows)
    assert "not timed: it is not there" in capsys.readouterr().out


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, usable: Callable[[], Any]
) -> list[dict[str, Any]]:
    file = folder / "rows.json"
    line = "compare rollout --case smallest --rounds 2 --threads 1 --allocator default --json"
    monkeypatch.setattr(sys, "argv", [*line.split(), str(file)])
    monkeypatch.setattr(compare_rollouts, "usable_samplers", usable)
    compare.main()
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def open_unbound(job: RolloutJob, model: Any) -> Contestant:
    """As `open_in_process`, in a process that is not started with the settings of threads."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return ENGINES[SYNCED[0]](job, model)


def open_served(job: RolloutJob, model: Any) -> Contestant:
    """As `open_server`, on a stand-in for the server; a start of vLLM's takes long."""
    os.environ[TOKEN_VARIABLE] = TOKEN
    stack = ExitStack()
    url, _ = stack.enter_context(stand_in_server(model.config))
    spec = engine_spec(job, model)
    sampler = VllmServerSampler(replace(spec, options=replace(spec.options, url=(url,))))
    stack.callback(sampler.close)
    return replace(contestant_of(sampler, model), close=stack.close)


def test_a_server_is_measured_with_all_its_processes(
    job: RolloutJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert family.stdout is not None
    child = int(family.stdout.readline())
    closed: list[bool] = []
    sampler = SimpleNamespace(process_id=family.pid, close=lambda: closed.append(True))
    asked: list[Any] = []
    monkeypatch.setattr(
        rollout_samplers, "VllmServerSampler", lambda spec: (asked.append(spec), sampler)[1]
    )
    model = policy_of(job)
    opened = rollout_samplers.open_server(job, model)
    assert opened.processes == (family.pid, child)
    assert asked[0].options.url is None  # it starts one
    opened.close()
    assert closed == [True]
    os.killpg(family.pid, signal.SIGKILL)
    family.wait()
    family.stdout.close()


@needs_vllm
def test_engines_beside_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The peer's process is started as all are; the others have imported everything already.
    contexts = iter([multiprocessing.get_context("spawn"), CONTEXT, CONTEXT])
    monkeypatch.setattr(
        rollout_worker.multiprocessing, "get_context", lambda method: next(contexts)
    )
    samplers = {PEER: PEERS[PEER], SYNCED[0]: open_unbound, SYNCED[1]: open_served}
    rows = run(tmp_path, monkeypatch, lambda: (samplers, {"absent": "it is not installed"}))
    names = [(row["pass"], row["implementation"]) for row in rows]
    assert names == [
        *(("generate", name) for name in (*samplers, "absent")),
        *(("sync", name) for name in SYNCED),
    ]
    for row in rows:
        if row["implementation"] == "absent":
            assert row["reason"] == "it is not installed"
            continue
        assert row["reason"] is None
        assert row["milliseconds"] > 0
        if row["pass"] == "generate":
            assert row["tokens_per_second"] == pytest.approx(1e3 * NUM_TOKENS / row["milliseconds"])
            assert row["peak_bytes"] > 2**20
    sync = [row for row in rows if row["pass"] == "sync"]
    assert sync[0]["bytes"] == sync[1]["bytes"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--case", "chat"], "--case: rollout has no 'chat'"),
        (["--pairs", "2"], "--pairs: rollout does not take it"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_flags_of_others_are_refused(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "rollout", *flags])
    with pytest.raises(SystemExit):
        compare.main()
    assert message in capsys.readouterr().err
