"""vLLM in a process of its own: killed, stopped, refused; nothing hangs and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from fastalign.rollouts import SamplerFailed, VllmProcessSampler, policy_tensors
from fastalign.rollouts.engines import own_process as vllm_process
from tests.rollouts.vllm_cases import (
    PARAMS,
    assert_a_sync_counts,
    largest_difference,
    make_policy,
    make_prompts,
    make_spec,
    needs_vllm,
    nothing_left_in_shared_memory,
)

pytestmark = [needs_vllm]
SILENCE = 5.0  # seconds, after which these tests count an engine as dead


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmProcessSampler]:
    with nothing_left_in_shared_memory():
        sampler = VllmProcessSampler(make_spec(make_policy(tied=True)))
        child = sampler.process_id
        yield sampler
        sampler.close()
        assert not psutil.pid_exists(child)


@pytest.fixture
def sampler(engine: VllmProcessSampler) -> VllmProcessSampler:
    if not psutil.pid_exists(engine.process_id) or stopped(engine):
        engine.rebuild()
    return engine


def stopped(sampler: VllmProcessSampler) -> bool:
    return psutil.Process(sampler.process_id).status() in ("stopped", "zombie")


def test_a_sync_counts(sampler: VllmProcessSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    # Buckets of a few tensors: the largest alone fills one.
    monkeypatch.setattr(sampler, "_memory_bytes", 4 * 320 * 64)
    assert_a_sync_counts(sampler, make_policy(tied=True))


def test_an_architecture_that_the_trainers_process_could_not_share() -> None:
    policy = make_policy("gpt_neox")
    alone = VllmProcessSampler(make_spec(policy))
    try:
        assert_a_sync_counts(alone, policy)
    finally:
        alone.close()


def test_tensors_that_differ_are_named(sampler: VllmProcessSampler) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    assert sampler.differing_tensors(policy_tensors(policy)) == ([], len(policy.state_dict()))
    with torch.no_grad():
        policy.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    names, _ = sampler.differing_tensors(policy_tensors(policy))
    assert names == ["model.layers.1.mlp.down_proj.weight"]


def test_refusals_are_the_callers_mistake_and_the_engine_goes_on(
    sampler: VllmProcessSampler,
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


def assert_rebuilt(sampler: VllmProcessSampler) -> None:
    """A new engine, given the weights, is as good as the old one."""
    dead = sampler.process_id
    sampler.rebuild()
    assert not psutil.pid_exists(dead)
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 3)
    assert largest_difference(policy, sampler.generate(make_prompts(), PARAMS, seed=0)) < 1e-4


@pytest.mark.parametrize("moment", ["between", "generate", "sync"])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_engine_is_told_in_time(
    sampler: VllmProcessSampler,
    kind: signal.Signals,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    monkeypatch.setattr(sampler, "_options", replace(sampler._options, silence_seconds=SILENCE))

    def hit() -> None:
        os.kill(sampler.process_id, kind)

    if moment == "between":
        hit()
    elif moment == "generate":
        monkeypatch.setattr(sampler, "_on_progress", lambda count: hit())
    else:  # between two buckets
        monkeypatch.setattr(sampler, "_memory_bytes", 4 * 320 * 64)
        hand_over = sampler._hand_over
        monkeypatch.setattr(sampler, "_hand_over", lambda bucket: (hand_over(bucket), hit()))
    start = time.monotonic()
    with pytest.raises(SamplerFailed) as failure:  # noqa: PT012 (one of two calls)
        if moment == "sync":
            sampler.sync_weights(policy_tensors(policy), 2)
        else:
            sampler.generate(make_prompts() * 8, replace(PARAMS, max_new_tokens=50), seed=0)
    monkeypatch.undo()
    assert time.monotonic() - start < 3 * SILENCE
    said = "killed by signal 9" if kind == signal.SIGKILL else "5 seconds"
    assert f"the engine's process {sampler.process_id}" in str(failure.value)
    assert said in str(failure.value)
    assert_rebuilt(sampler)


def test_a_stopped_engine_does_not_hold_a_trainer_that_writes_more_than_a_pipe_takes(
    sampler: VllmProcessSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sampler,
        "_spec",
        replace(sampler._spec, options=replace(sampler._spec.options, silence_seconds=1)),
    )
    monkeypatch.setattr(sampler, "_options", sampler._spec.options)
    sampler.rebuild()
    sampler.sync_weights(policy_tensors(make_policy(tied=True)), 1)
    os.kill(sampler.process_id, signal.SIGSTOP)
    with pytest.raises(SamplerFailed, match=r"read nothing for 1 seconds|no progress"):
        sampler.generate([[5] * 200] * 3000, PARAMS, seed=0)
    monkeypatch.undo()
    sampler.rebuild()


TRAINER = """
import sys, time
sys.path.insert(0, {root!r})
from tests.rollouts.vllm_cases import make_policy, make_spec
from fastalign.rollouts import VllmProcessSampler
sampler = VllmProcessSampler(make_spec(make_policy()))
print(sampler.process_id, flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_process_and_no_memory_behind() -> None:
    code = TRAINER.format(root=str(Path(__file__).parents[2]))
    with nothing_left_in_shared_memory():
        trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert trainer.stdout is not None
        engine = psutil.Process(int(trainer.stdout.readline()))
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        psutil.wait_procs([engine], timeout=20)
        assert not engine.is_running()


@pytest.mark.parametrize(
    ("what", "said"),
    [("exec sleep 600", r"did not start for 0\.5 seconds"), ("exit 7", r"is gone \(exit code 7\)")],
)
def test_an_engine_that_does_not_start_is_told_in_time(
    what: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{what}\n")
    python.chmod(0o755)
    monkeypatch.setattr(vllm_process.sys, "executable", str(python))
    spec = make_spec(make_policy())
    seconds = 0.5 if "sleep" in what else 60.0
    silent = replace(spec, options=replace(spec.options, start_seconds=seconds))
    with pytest.raises(SamplerFailed, match=said):
        VllmProcessSampler(silent)
