"""A sampler that is kept at a policy's weights: synced when they change, checked, rebuilt."""

import os
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.rollouts import (
    Completion,
    PolicyAccess,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    TransformersSampler,
)
from fastalign.rollouts.engines import weights
from fastalign.rollouts.engines.weights import (
    Tally,
    fit_tensors,
    policy_tensors,
    shapes_of_config,
    sync_folder,
)
from tests.tiny import put_adapter, tiny_model

PROMPTS = [[1, 5, 9], [1], [1, 7, 30, 31, 32, 33], [1, 5, 9]]
PARAMS = SamplingParams(max_new_tokens=6, num_samples=2)


class FakeEngine:
    """A copy of the policy in this process, which fails when it is told to."""

    def __init__(self, fail_at: Sequence[str] = ()):
        self.model = tiny_model("llama", seed=9)
        self.calls: list[str] = []
        self.fail_at = list(fail_at)
        self.version: int | None = None
        self.adapter = ""

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_at and self.fail_at[0] == name:
            self.fail_at.pop(0)
            self.version = None
            raise SamplerFailed(f"sampler: {name} failed")

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        self._call("generate")
        inner = TransformersSampler(self.model, eos_token_ids=[2], pad_token_id=2)
        inner.version = -1 if self.version is None else self.version
        return inner.generate(prompt_ids, params, seed=seed)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._call("sync")
        self.model.load_state_dict(dict(named_tensors))
        self.version = version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        self._call("adapter")
        assert Path(folder, "adapter_model.safetensors").is_file()
        self.adapter, self.version = str(folder), version

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        own = self.model.state_dict()
        names = [name for name, value in named_tensors if not torch.equal(own[name], value)]
        return names, len(own)

    def needs_weights(self) -> bool:
        return self.version is None

    def metrics(self) -> dict[str, float | int]:
        return {}

    def sleep(self) -> None:
        self._call("sleep")

    def rebuild(self) -> None:
        self._call("rebuild")
        self.version = None

    def close(self) -> None:
        self._call("close")


def synced(model: Any, engine: FakeEngine, **options: Any) -> SyncedSampler:
    return SyncedSampler(
        PolicyAccess(model), engine, **({"num_rebuilds": 2, "max_difference": 1e-3} | options)
    )


def nudge(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def test_weights_are_synced_when_the_policy_has_changed_and_only_then() -> None:
    model, engine = tiny_model("llama"), FakeEngine()
    sampler = synced(model, engine)
    first = sampler.generate(PROMPTS, PARAMS, seed=1)
    assert sampler.generate(PROMPTS, PARAMS, seed=1) == first
    assert engine.calls == ["sync", "generate", "sleep", "generate", "sleep"]
    assert "sampling/sampling_logp_difference/max" in sampler.metrics()
    nudge(model)
    sampler.version = 1
    second = sampler.generate(PROMPTS, PARAMS, seed=1)
    assert engine.calls[5:] == ["sync", "generate", "sleep"]
    assert {answer.version for answers in second for answer in answers} == {1}
    assert second != first
    expected = TransformersSampler(model, eos_token_ids=[2], pad_token_id=2)
    expected.version = 1
    assert second == expected.generate(PROMPTS, PARAMS, seed=1)
    metrics = sampler.metrics()
    assert metrics["sampling/num_rebuilds"] == 0
    # measured anew: the new weights were checked too
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["time/sync_seconds"] > 0
    assert sampler.metrics()["time/sync_seconds"] == 0


def test_an_engine_with_other_weights_stops_the_run_and_names_them() -> None:
    model, engine = tiny_model("llama"), FakeEngine()
    sampler = synced(model, engine)
    sampler.generate(PROMPTS, PARAMS, seed=1)
    nudge(model)
    engine.version = sampler.version = 1  # an engine that says it has them
    sampler.generate(PROMPTS, PARAMS, seed=1)  # not checked again: nothing was synced
    sampler._checked = False
    with pytest.raises(SamplerFailed) as failure:
        sampler.generate(PROMPTS, PARAMS, seed=1)
    said = str(failure.value)
    assert "nats a token off the policy's on average, expected at most 0.001" in said
    assert "model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight" in said
    assert "and 13 more" in said
    assert "rebuild" not in engine.calls
    assert sampler.metrics()["sampling/sampling_logp_difference/mean"] > 1e-3


def test_one_token_at_the_edge_of_top_p_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = tiny_model("llama"), FakeEngine()
    sampler = synced(model, engine)
    real = FakeEngine.generate

    def shifted(self: FakeEngine, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        found = real(self, *args, **kwargs)
        first = found[0][0]
        logprobs = [first.logprobs[0] - 100.0, *first.logprobs[1:]]
        return [[replace(first, logprobs=logprobs), *found[0][1:]], *found[1:]]

    monkeypatch.setattr(FakeEngine, "generate", shifted)
    sampler.generate(PROMPTS, PARAMS, seed=1)
    metrics = sampler.metrics()
    assert metrics["sampling/sampling_logp_difference/max"] == 20.0
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4


@pytest.mark.parametrize(
    ("fail_at", "calls"),
    [
        (["generate"], ["sync", "generate", "rebuild", "sync", "generate", "sleep"]),
        (["sync"], ["sync", "rebuild", "sync", "generate", "sleep"]),
        (
            ["sync", "generate"],
            ["sync", "rebuild", "sync", "generate", "rebuild", "sync", "generate", "sleep"],
        ),
        (["rebuild"], ["sync", "generate", "sleep"]),
    ],
)
def test_a_failed_engine_is_built_anew_and_its_work_repeated(
    fail_at: list[str], calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, engine = tiny_model("llama"), FakeEngine(fail_at)
    sampler = synced(model, engine)
    found = sampler.generate(PROMPTS, PARAMS, seed=1)
    assert found == synced(model, FakeEngine()).generate(PROMPTS, PARAMS, seed=1)
    assert engine.calls == calls
    assert sampler.metrics()["sampling/num_rebuilds"] == calls.count("rebuild")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"sampler: {name} failed; it is built anew and its work repeated"
        for name in fail_at[: calls.count("rebuild")]
    ]


def test_an_engine_that_fails_again_and_again_ends_the_run() -> None:
    engine = FakeEngine(["generate"] * 3)
    with pytest.raises(SamplerFailed, match="generate failed"):
        synced(tiny_model("llama"), engine).generate(PROMPTS, PARAMS, seed=1)
    assert engine.calls.count("rebuild") == 2


def test_an_adapter_alone_is_synced_and_its_folder_is_left_until_the_next(tmp_path: Path) -> None:
    model, engine = put_adapter(tiny_model("llama"), "q_proj"), FakeEngine()
    sampler = synced(model, engine, adapter_folder=str(tmp_path), max_difference=100.0)
    sampler.generate(PROMPTS, PARAMS, seed=1)
    first = engine.adapter
    sampler.version = 1
    sampler.generate(PROMPTS, PARAMS, seed=1)
    assert engine.calls == [
        *("sync", "adapter", "generate", "sleep"),
        *("adapter", "generate", "sleep"),
    ]
    assert not Path(first).exists()
    assert [str(path) for path in tmp_path.iterdir()] == [engine.adapter]
    engine.fail_at = ["generate"]
    sampler.generate(PROMPTS, PARAMS, seed=1)
    assert engine.calls[7:] == ["generate", "rebuild", "sync", "adapter", "generate", "sleep"]
    sampler.close()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_a_killed_process_left_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f"fastalign-sync-{socket.gethostname()}-{dead.pid}-abc"
    others = tmp_path / f"fastalign-sync-elsewhere-{dead.pid}-abc"
    mine = tmp_path / f"fastalign-sync-{socket.gethostname()}-{os.getpid()}-abc"
    for folder in (left, others, mine):
        folder.mkdir()
    with sync_folder(str(tmp_path)) as made:
        assert {path.name for path in tmp_path.iterdir()} == {
            *(others.name, mine.name),
            Path(made).name,
        }
    assert not left.exists()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    tally = Tally()
    list(tally.through(tensors))
    return tally.digest


def test_the_hash_of_weights_is_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WORDS_PER_ROW", 64)  # several rows, and a part of one
    large, small = torch.randn(31, 33), torch.randn(7).bfloat16()
    before = digest([("a", large), ("b", small)])
    assert digest([("b", small.clone()), ("a", large.T.contiguous().T)]) == before
    assert len(before) == 16
    assert digest([]) == ""
    bit = large.clone()
    bit.view(torch.int32)[30, 32] ^= 1
    others = [-large, large.flip(0), large.roll(64), large + 0.0 * large.sign(), bit]
    others += [large.view(33, 31), large.double(), torch.zeros(31, 33), torch.zeros(31, 32)]
    found = {digest([("a", other), ("b", small)]) for other in others}
    found |= {digest([("b", large), ("a", small)]), digest([("a", large)])}
    assert len(found - {before}) == len(others) + 1  # one of them is the same numbers


def test_a_nan_in_the_policy_never_reaches_an_engine() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight holds a non-finite weight"):
        fit_tensors(policy_tensors(model), shapes_of_config(model.config))
