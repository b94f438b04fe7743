"""A server that the sampler starts: killed, stopped, refused; nothing hangs and nothing is left."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fastalign.rollouts import EngineSpec, SamplerFailed, VllmServerSampler, policy_tensors
from fastalign.rollouts.engines import server_process, weights
from tests.rank_processes import CONTEXT
from tests.rollouts.vllm_cases import (
    PARAMS,
    assert_a_sync_counts,
    largest_difference,
    make_policy,
    make_prompts,
    make_spec,
    needs_vllm,
    nothing_left_in_shared_memory,
    process_named,
    python_of_the_page,
)

pytestmark = [needs_vllm]
OF_THIS_RUN = "^sampler: the vLLM server of this run "
SILENCE = 5.0  # seconds, after which these tests count an engine as dead


def folders_left(process: int | None = None) -> set[str]:
    """Folders of a process's servers, by default of this one's."""
    pattern = f"fastalign-server-{process or os.getpid()}-*"
    return {path.name for path in Path(tempfile.gettempdir()).glob(pattern)}


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmServerSampler]:
    before = folders_left()
    with nothing_left_in_shared_memory():
        sampler = VllmServerSampler(make_spec(make_policy(tied=True)))
        yield sampler
        sampler.close()  # the last test has closed it, unless one failed
    assert folders_left() <= before


@pytest.fixture
def sampler(engine: VllmServerSampler) -> VllmServerSampler:
    """One server for all tests, built anew if a failed test left it broken."""
    try:
        broken = {"stopped", "zombie"} & {process.status() for process in family_of(engine)}
    except (AssertionError, psutil.NoSuchProcess, IndexError, StopIteration):
        broken = {"gone"}
    if broken:
        engine.rebuild()
    return engine


def family_of(sampler: VllmServerSampler) -> list[psutil.Process]:
    return [process_named(who, sampler.process_id) for who in ("supervisor", "api", "engine")]


def test_a_sync_counts(sampler: VllmServerSampler) -> None:
    assert_a_sync_counts(sampler, make_policy(tied=True))


def test_it_listens_where_nobody_else_can_reach_it(sampler: VllmServerSampler) -> None:
    api = process_named("api", sampler.process_id)
    assert [c for c in api.net_connections("inet") if c.status == "LISTEN"] == []
    assert sampler._own is not None
    assert Path(sampler._own.socket).parent.stat().st_mode & 0o077 == 0


def test_the_python_on_the_page_of_vllm_runs(
    sampler: VllmServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the server that is running, whose sizes its policy has."""
    opened: list[EngineSpec] = []

    def open_it(spec: EngineSpec) -> VllmServerSampler:
        opened.append(spec)
        return sampler

    config, closed = make_policy(tied=True).config, []
    monkeypatch.setattr("transformers.LlamaConfig", lambda **sizes: config)
    monkeypatch.setattr("fastalign.rollouts.VllmServerSampler", open_it)
    monkeypatch.setattr(sampler, "close", lambda: closed.append(True))
    sampler.sync_weights(policy_tensors(make_policy(tied=True)), 7)
    names: dict[str, Any] = {}
    exec(python_of_the_page()[1], names)
    assert (len(opened), closed) == (1, [True])
    assert [answers[0].version for answers in names["answers"]] == [1, 1]


def test_tensors_that_differ_are_named(sampler: VllmServerSampler) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    assert sampler.differing_tensors(policy_tensors(policy)) == ([], len(policy.state_dict()))
    with torch.no_grad():
        policy.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    names, _ = sampler.differing_tensors(policy_tensors(policy))
    assert names == ["model.layers.1.mlp.down_proj.weight"]


def test_refusals_are_the_callers_mistake_and_the_engine_goes_on(
    sampler: VllmServerSampler,
) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    with pytest.raises(ValueError, match="prompt 0: expected tokens from 0 to 319, got 320"):
        sampler.generate([[320]], PARAMS, seed=0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        sampler.sync_weights(
            (pair for pair in policy_tensors(policy) if pair[0] != "lm_head.weight"), 2
        )
    found = sampler.generate(make_prompts(), PARAMS, seed=0)
    assert largest_difference(policy, found) < 1e-4
    assert found[0][0].version == 1


def assert_usable(sampler: VllmServerSampler) -> None:
    """A server that was given the weights is as good as ever."""
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 3)
    assert largest_difference(policy, sampler.generate(make_prompts(), PARAMS, seed=0)) < 1e-4


def impatient(sampler: VllmServerSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = sampler.servers[0].connection
    monkeypatch.setattr(connection, "_silence", SILENCE)
    monkeypatch.setattr(connection._client, "timeout", SILENCE)


@pytest.mark.parametrize(("who", "moment"), [("api", "generate"), ("engine", "sync")])
def test_a_stopped_server_is_reported_in_time_and_goes_on(
    sampler: VllmServerSampler, who: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    impatient(sampler, monkeypatch)
    process, write = process_named(who, sampler.process_id), weights.write_tensors
    monkeypatch.setattr(  # the weights are written, the server has not read them
        "fastalign.rollouts.engines.server.write_tensors",
        lambda *arguments: (write(*arguments), process.suspend()),
    )
    start = time.monotonic()
    with pytest.raises(SamplerFailed, match=OF_THIS_RUN):  # noqa: PT012 (one of two)
        if moment == "sync":
            sampler.sync_weights(policy_tensors(policy), 2)
        process.suspend()
        sampler.generate(make_prompts(), PARAMS, seed=0)
    assert time.monotonic() - start < 4 * SILENCE
    monkeypatch.undo()
    process.resume()
    assert_usable(sampler)


def assert_killed(sampler: VllmServerSampler, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two calls, or, the engine, among its completions: it is reported, and all end."""
    sampler.sync_weights(policy_tensors(make_policy(tied=True)), 1)
    impatient(sampler, monkeypatch)
    victim, family = process_named(who, sampler.process_id), family_of(sampler)

    def hit(*_: object) -> None:
        if victim.is_running() and victim.status() != "zombie":
            victim.kill()

    if who == "engine":
        monkeypatch.setattr(sampler, "_on_progress", hit)
    else:
        hit()
        assert psutil.wait_procs(family[1:], timeout=20)[1] == []  # they end with their supervisor
    start = time.monotonic()
    with pytest.raises(SamplerFailed, match=OF_THIS_RUN):
        sampler.generate(make_prompts() * 20, replace(PARAMS, max_new_tokens=50), seed=0)
    monkeypatch.undo()
    assert time.monotonic() - start < 4 * SILENCE
    sampler.close()
    assert not [process for process in family if process.is_running()]


def test_a_server_whose_engine_is_killed_is_reported_in_time_and_built_anew(
    sampler: VllmServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_killed(sampler, "engine", monkeypatch)
    sampler.rebuild()
    assert_usable(sampler)


def test_a_server_whose_supervisor_is_killed_ends(
    sampler: VllmServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this server."""
    assert_killed(sampler, "supervisor", monkeypatch)


def train(found: Any) -> None:
    """A trainer with a server; it says where, and waits to be killed.

    The model's architecture is one that the trainer's process could not share with vLLM.
    """
    policy = make_policy("gpt_neox")
    sampler = VllmServerSampler(make_spec(policy))
    assert_a_sync_counts(sampler, policy)
    kept = weights.sync_folder(None)
    found.send((sampler.process_id, kept.name))
    signal.pause()


def test_a_killed_trainer_leaves_no_process_no_memory_and_no_folder_behind() -> None:
    with nothing_left_in_shared_memory():
        receiver, sender = CONTEXT.Pipe(duplex=False)
        trainer = CONTEXT.Process(target=train, args=(sender,))
        trainer.start()
        sender.close()
        number, weights_folder = receiver.recv()
        receiver.close()
        assert trainer.pid is not None
        supervisor = psutil.Process(number)
        family = [supervisor, *supervisor.children(recursive=True)]
        assert folders_left(trainer.pid) != set()
        trainer.kill()
        trainer.join()
        assert psutil.wait_procs(family, timeout=30)[1] == []
    assert folders_left(trainer.pid) == set()
    assert not Path(weights_folder).exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("exec sleep 600", r"this run did not start in 0\.5 seconds"),
        ("kill -STOP $$", r"this run did not start in 0\.5 seconds"),
        (
            "echo 'RuntimeError: no room' >&2; exit 7",
            r"of this run ended \(exit code 7\): RuntimeError: no room",
        ),
    ],
)
def test_a_server_that_does_not_start_is_reported_in_time(
    what: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, before = tmp_path / "python", folders_left()
    python.write_text(f"#!/bin/sh\n{what}\n")
    python.chmod(0o755)
    spec = make_spec(make_policy())
    seconds = 60.0 if "exit" in what else 0.5
    processes = psutil.Process().children(recursive=True)
    silent = replace(spec, options=replace(spec.options, start_seconds=seconds))
    real = server_process.server_command
    monkeypatch.setattr(
        server_process, "server_command", lambda *a, **k: [str(python), *real(*a, **k)[1:]]
    )
    with pytest.raises(SamplerFailed, match=said):
        VllmServerSampler(silent)
    assert folders_left() <= before
    assert set(psutil.Process().children(recursive=True)) <= set(processes)


def test_weights_that_do_not_fit_in_memory_go_through_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with weights.sync_folder(None, 10) as small, weights.sync_folder(None, 2**60) as large:
        assert Path(small).parent == Path("/dev/shm")
        assert Path(large).parent == Path(tempfile.gettempdir())
    assert not os.path.exists(large)
