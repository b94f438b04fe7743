"""Several servers: equal shares, the same weights, and one that fails is left out and said."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.rollouts import (
    Completion,
    PolicyAccess,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    VllmServerSampler,
    policy_tensors,
)
from fastalign.rollouts.engines.broadcast import Broadcaster
from fastalign.rollouts.engines.server import in_shares
from tests.rank_processes import free_port
from tests.rollouts.stand_in_server import TOKEN, StandInProcess, Worker, stand_in_server
from tests.rollouts.vllm_cases import OPTIONS, digest_of, make_policy, make_spec, train_a_little
from tests.tiny import put_adapter

PROMPTS = [[5, 9], [7], [30, 31, 32], [5, 9], [11, 12]]
PARAMS = SamplingParams(max_new_tokens=4, num_samples=2)
Stands = list[tuple[str, Worker]]


@pytest.fixture
def stands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stands]:
    """Three servers in this process."""
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)
    config = make_policy().config
    with ExitStack() as stack:
        yield [stack.enter_context(stand_in_server(config)) for _ in range(3)]


def open_sampler(urls: Sequence[str], **settings: Any) -> VllmServerSampler:
    on_progress = settings.pop("on_progress", None)
    options = replace(OPTIONS, **{"url": tuple(urls), "start_seconds": 5.0, **settings})
    return VllmServerSampler(
        replace(make_spec(make_policy()), options=options), on_progress=on_progress
    )


def of_one(stands: Stands, policy: Any, version: int = 1) -> list[list[Completion]]:
    """What one server draws, from the policy's weights."""
    sampler = open_sampler([stands[0][0]])
    sampler.sync_weights(policy_tensors(policy), version)
    found = sampler.generate(PROMPTS, PARAMS, seed=3)
    sampler.close()
    return found


def assert_has(worker: Worker, policy: Any) -> None:
    theirs = worker.model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in policy_tensors(policy))


def test_rows_are_cut_into_equal_shares() -> None:
    assert in_shares(range(7), 3) == [range(2), range(2, 4), range(4, 7)]
    assert in_shares([1], 2) == [[], [1]]


@pytest.mark.parametrize("transport", ["files", "network"])
def test_servers_share_the_prompts_and_draw_what_one_draws(stands: Stands, transport: str) -> None:
    policy = make_policy()
    train_a_little(policy)
    expected, before = of_one(stands, policy), stands[0][1].counts["completion"]
    done: list[int] = []
    sampler = open_sampler([url for url, _ in stands], transport=transport, on_progress=done.append)
    sampler.sync_weights(policy_tensors(policy), 1)
    for _, worker in stands:
        assert_has(worker, policy)
        assert json.loads(worker.fastalign_state())["version"] == sampler._name
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == expected
    counts = [worker.counts["completion"] for _, worker in stands]
    assert [counts[0] - before, *counts[1:]] == [3, 3, 4]
    assert sum(done) == 10
    assert sampler.metrics() == {"sampling/num_servers": 3, "sampling/num_lost_servers": 0}
    assert sampler.differing_tensors(policy_tensors(policy))[0] == []
    with torch.no_grad():  # of the last server alone
        stands[2][1].model.model.norm.weight.mul_(1.5)
    assert sampler.differing_tensors(policy_tensors(policy))[0] == ["model.norm.weight"]
    sampler.close()


def test_one_server_has_no_metrics_of_several(stands: Stands) -> None:
    sampler = open_sampler([stands[0][0]])
    assert sampler.metrics() == {}
    sampler.close()


def breaks(worker: Worker, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this method of a server's worker fails."""

    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("it broke")

    monkeypatch.setattr(worker, method, fail, raising=False)


def test_a_failure_among_the_transfers_does_not_hold_the_others_up(
    stands: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other servers wait for their next tensor, for as long as a transfer may take."""
    policy, (_, (url, worker), _) = make_policy(), stands
    expected = of_one(stands, policy)
    sampler = open_sampler([url for url, _ in stands], transport="network", silence_seconds=5)
    has_failed, begun = Broadcaster._has_failed, threading.Event()
    num_asked = 0

    def noted(self: Broadcaster) -> bool:
        nonlocal num_asked
        found = has_failed(self)
        num_asked += self._server.url == url
        if num_asked == 2:  # it has taken the first tensor, and is sent another now
            begun.set()
        return found

    def fail(weights_iterator: Any) -> None:
        assert begun.wait(60)
        raise RuntimeError("it broke")

    monkeypatch.setattr(Broadcaster, "_has_failed", noted)
    monkeypatch.setattr(worker, "reload_weights", fail)
    sampler.sync_weights(policy_tensors(policy), 1)
    assert sampler.metrics() == {"sampling/num_servers": 2, "sampling/num_lost_servers": 1}
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == expected
    sampler.close()


@pytest.mark.parametrize("transport", ["files", "network"])
def test_a_server_that_fails_in_a_sync_is_left_out_until_it_takes_weights_again(
    stands: Stands,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = make_policy()
    expected = of_one(stands, policy)
    urls = [url for url, _ in stands]
    sampler = open_sampler(urls, transport=transport, silence_seconds=5)
    with monkeypatch.context() as patch:
        breaks(stands[1][1], "reload_weights", patch)
        sampler.sync_weights(policy_tensors(policy), 1)
    said = capsys.readouterr().out
    assert said.startswith(f"sampler: the server at {urls[1]} failed (/fastalign/")
    left_out = "; it is left out and its work repeated by the others (2 of 3 servers are left)\n"
    assert said.count("\n") == 1
    assert said.endswith(left_out)
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == expected
    assert stands[1][1].counts["completion"] == 0
    assert sampler.metrics() == {"sampling/num_servers": 2, "sampling/num_lost_servers": 1}
    assert sampler.metrics()["sampling/num_lost_servers"] == 0
    train_a_little(policy)
    sampler.sync_weights(policy_tensors(policy), 2)
    assert capsys.readouterr().out == f"sampler: the server at {urls[1]} is used again\n"
    assert_has(stands[1][1], policy)
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == of_one(stands, policy, 2)
    assert stands[1][1].counts["completion"] == 4
    assert sampler.metrics() == {"sampling/num_servers": 3, "sampling/num_lost_servers": 0}
    sampler.close()


def test_a_server_with_other_weights_is_left_out_of_the_answers(
    stands: Stands, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, urls = make_policy(), [url for url, _ in stands]
    sampler = open_sampler(urls)
    sampler.sync_weights(policy_tensors(policy), 1)
    stands[2][1]._fastalign_version = "another run's"
    done: list[int] = []
    sampler._on_progress = done.append
    found = sampler.generate(PROMPTS, PARAMS, seed=3)
    said = f"sampler: the server at {urls[2]} was started again, or is used by another run; it is"
    assert capsys.readouterr().out.startswith(said)
    assert found == of_one(stands, policy)
    assert {answer.weights for answers in found for answer in answers} == {digest_of(policy)}
    assert sum(done) == 10
    sampler.close()


def test_completions_of_a_server_that_fails_half_way_count_once(
    stands: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, done = make_policy(), list[int]()
    expected = of_one(stands, policy)
    sampler = open_sampler([url for url, _ in stands[:2]], on_progress=done.append)
    sampler.sync_weights(policy_tensors(policy), 1)
    engine_of = stands[1][1]
    real = engine_of.count

    def count(what: str) -> None:
        real(what)
        if what == "completion" and engine_of.counts[what] == 5:
            engine_of._fastalign_version = "lost"  # found when the last of its share is done

    monkeypatch.setattr(engine_of, "count", count)
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == expected
    assert sum(done) == 10
    assert min(done) == -5
    sampler.close()


def test_the_failure_of_the_last_server_is_raised(
    stands: Stands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = open_sampler([url for url, _ in stands])
    with monkeypatch.context() as patch:
        for _, worker in stands:
            breaks(worker, "reload_weights", patch)
        with pytest.raises(SamplerFailed, match=rf"server at {stands[0][0]} failed .* it broke"):
            sampler.sync_weights(policy_tensors(make_policy()), 1)
    assert capsys.readouterr().out == ""
    assert sampler.metrics()["sampling/num_lost_servers"] == 3
    with pytest.raises(SamplerFailed, match="no weights"):
        sampler.generate(PROMPTS, PARAMS, seed=3)
    with monkeypatch.context() as patch:
        breaks(stands[0][1], "fastalign_state", patch)  # the others are enough to go on
        sampler.rebuild()
        assert sampler.metrics()["sampling/num_servers"] == 2
    sampler.sync_weights(policy_tensors(make_policy()), 1)
    assert sampler.metrics()["sampling/num_servers"] == 3
    sampler.close()


def test_every_server_must_be_there_at_the_beginning(stands: Stands, tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SamplerFailed, match=rf"no vLLM server at {gone} in 0\.5 seconds"):
        open_sampler([stands[0][0], gone], start_seconds=0.5)
    other = make_policy()
    other.config.num_hidden_layers = 3
    with (
        stand_in_server(other.config) as (url, _),
        pytest.raises(ValueError, match=rf"server at {url} has another model: expected num_hidden"),
    ):
        open_sampler([stands[0][0], url])


def test_a_server_that_comes_back_with_another_model_stays_left_out(
    stands: Stands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, url = make_policy(), stands[1][0]
    sampler = open_sampler([stands[0][0], url])
    with monkeypatch.context() as patch:
        breaks(stands[1][1], "reload_weights", patch)
        sampler.sync_weights(policy_tensors(policy), 1)
    capsys.readouterr()
    other = make_policy()
    other.config.vocab_size = 400
    stands[1][1].model_config.hf_config = other.config
    sampler.sync_weights(policy_tensors(policy), 2)
    told = f"vllm.url: the server at {url} has another model: expected vocab_size 320, got 400"
    assert capsys.readouterr().out == f"{told}; it stays left out\n"
    sampler.sync_weights(policy_tensors(policy), 3)
    assert capsys.readouterr().out == ""
    sampler.close()


def test_an_adapter_reaches_a_server_that_comes_back_behind_its_base(
    stands: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = put_adapter(make_policy(), "all-linear", rank=3)
    inner = open_sampler([url for url, _ in stands[:2]])
    sampler = SyncedSampler(PolicyAccess(policy), inner, num_rebuilds=0, max_difference=1e-3)
    for version in range(4):
        train_a_little(policy, seed=version)
        sampler.version = version
        with monkeypatch.context() as patch:
            if version == 1:
                breaks(stands[1][1], "fastalign_adapted", patch)
            sampler.generate(PROMPTS, PARAMS, seed=version)
        metrics = sampler.metrics()
        assert metrics["sampling/num_servers"] == (1 if version == 1 else 2)
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
        loads = [worker.counts["load"] for _, worker in stands[:2]]
        assert loads == ([1, 1] if version < 2 else [2, 2])
    sampler.close()


def test_each_server_is_checked_after_a_sync(stands: Stands) -> None:
    """Whichever computes with other weights than it says that it has."""
    policy = make_policy()
    urls = [url for url, _ in stands]
    for _, worker in stands:
        sampler = SyncedSampler(
            PolicyAccess(policy), open_sampler(urls), num_rebuilds=0, max_difference=1e-3
        )
        sampler.generate(PROMPTS, PARAMS, seed=0)
        with torch.no_grad():
            worker.model.model.norm.weight.mul_(1.5)
        sampler._checked = False
        with pytest.raises(SamplerFailed, match=r"does not compute with: model\.norm\.weight"):
            sampler.generate(PROMPTS, PARAMS, seed=0)
        sampler.close()


@pytest.mark.parametrize("moment", ["load", "tensor", "completion"])
def test_a_server_that_is_killed_is_left_out_and_used_again(
    moment: str, stands: Stands, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the sync by a file, in the midst of one over the network, among its completions."""
    policy = make_policy()
    expected = of_one(stands, policy)
    other = StandInProcess(policy.config, (moment, 3 if moment != "load" else 1))
    transport = "network" if moment == "tensor" else "files"
    sampler = open_sampler(
        [stands[0][0], other.url], transport=transport, silence_seconds=20, start_seconds=60
    )
    sampler.sync_weights(policy_tensors(policy), 1)
    assert sampler.generate(PROMPTS, PARAMS, seed=3) == expected
    other.process.join(20)
    assert other.process.exitcode == -9
    assert "; it is left out and its work repeated by the others (1 of 2" in capsys.readouterr().out
    assert sampler.metrics() == {"sampling/num_servers": 1, "sampling/num_lost_servers": 1}
    sampler.close()
