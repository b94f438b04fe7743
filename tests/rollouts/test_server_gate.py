"""The gate of a vLLM server, before a stand-in for vLLM: who is let in, and to what."""

import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from fastalign.rollouts import (
    PolicyAccess,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    VllmServerSampler,
    policy_tensors,
)
from tests.rollouts.stand_in_server import TOKEN, StandInProcess, stand_in_server
from tests.rollouts.vllm_cases import (
    OPTIONS,
    assert_a_sync_counts,
    digest_of,
    make_policy,
    make_spec,
)

OURS = {"authorization": f"Bearer {TOKEN}"}
PARAMS = SamplingParams(max_new_tokens=4)
CLIENT = httpx2.Client()  # one, as each takes a tenth of a second to make


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Any]]:
    with stand_in_server(make_policy(tied=True).config) as found:
        yield found


@pytest.fixture
def sampler(
    served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[VllmServerSampler]:
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)
    options = replace(OPTIONS, url=served[0])
    opened = VllmServerSampler(replace(make_spec(make_policy(tied=True)), options=options))
    yield opened
    opened.close()


def test_a_sync_counts(sampler: VllmServerSampler) -> None:
    assert_a_sync_counts(sampler, make_policy(tied=True))


def status(url: str, path: str, method: str = "POST", body: Any = None, **headers: str) -> int:
    kind = {"content-type": "application/json"}
    content = json.dumps({"arguments": []} if body is None else body)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return CLIENT.request(method, url + path, content=content, headers=kind | sent).status_code


OPEN = ["/health", "/metrics", "/v1/models", "/v1/completions", "/fastalign/state"]
CLOSED = [
    *("/collective_rpc", "/update_weights", "/pause", "/v1/chat/completions", "/invocations"),
    *("/docs", "/", "/fastalign/", "/fastalign/save_sharded_state", "/fastalign/fastalign_load"),
    *("/fastalign/_take", "/fastalign/../collective_rpc", "/v1/completions/", "//collective_rpc"),
]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_nobody_is_let_in_without_the_token_or_from_a_web_page(
    served: tuple[str, Any], method: str
) -> None:
    url = served[0]
    for path in [*OPEN, *CLOSED]:
        assert status(url, path, method) == 401
        assert status(url, path, method, **OURS, origin="http://evil.example") == 403
    for wrong in ("", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}"):
        assert status(url, "/health", method, authorization=wrong) == 401
    for origin in ("null", url, ""):
        assert status(url, "/v1/completions", method, **OURS, origin=origin) == 403


def test_what_a_trainer_does_not_need_is_closed(served: tuple[str, Any]) -> None:
    for path in CLOSED:
        assert status(served[0], path, "POST", **OURS) == 404
    for method, path in (("GET", "/fastalign/state"), ("OPTIONS", "/health"), ("GET", "/docs")):
        assert status(served[0], path, method, **OURS) == 404


def test_a_method_takes_a_list_of_texts_as_json(served: tuple[str, Any]) -> None:
    url, path = served[0], "/fastalign/state"
    assert status(url, path, **OURS) == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert status(url, path, **OURS, content_type=kind) == 415
    for body in ([], {}, {"arguments": [1]}, {"arguments": [["x"]]}, {"arguments": 7}, "text"):
        assert status(url, path, body=body, **OURS) == 400
    assert status(url, path, body={"arguments": ["one too many"]}, **OURS) == 500


def test_texts_of_other_weights_than_the_trainer_s_are_not_used(
    sampler: VllmServerSampler, served: tuple[str, Any], tmp_path: Path
) -> None:
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 1)
    found = sampler.generate([[5, 9]], PARAMS, seed=0)
    assert found[0][0].weights == digest_of(policy)
    served[1].fastalign_load = lambda folder, version: json.dumps({"number": 0, "digest": ""})
    # The same name, by which another trainer's sync could not be told from this one's.
    served[1]._fastalign_version = sampler._name
    sampler.servers[0].connection.call("load", str(tmp_path), sampler._name)
    del served[1].fastalign_load
    with pytest.raises(SamplerFailed, match="started again, or is used by another run"):
        sampler.generate([[5, 9]], PARAMS, seed=0)
    assert sampler.version is None


def test_an_engine_that_skips_tensors_is_found_out(
    sampler: VllmServerSampler, served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tied=True)

    def reload(weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(weights_iterator)

    monkeypatch.setattr(served[1], "reload_weights", reload)
    with pytest.raises(ValueError, match=r"read 1 tensors or files in .* the 21 written there"):
        sampler.sync_weights(policy_tensors(policy), 1)


def test_a_server_that_is_killed_is_waited_for_and_the_work_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)
    policy = make_policy(tied=True)
    prompts = [[5, 9], [7], [30, 31], [8]]
    server = StandInProcess(policy.config, ("completion", 7))
    options = replace(OPTIONS, url=server.url, start_seconds=60)

    def start_again() -> None:
        server.process.join(20)
        assert server.process.exitcode == -9
        server.start(wait=False)

    sampler = SyncedSampler(
        PolicyAccess(policy),
        VllmServerSampler(replace(make_spec(policy), options=options)),
        num_rebuilds=1,
        max_difference=1e-3,
        on_rebuild=start_again,
    )
    try:
        expected = sampler.generate(prompts, PARAMS, seed=0)
        assert sampler.metrics()["sampling/num_rebuilds"] == 0
        # The step that failed is repeated, with the policy's weights, on the server that is new.
        assert sampler.generate(prompts, PARAMS, seed=0) == expected
        assert sampler.metrics()["sampling/num_rebuilds"] == 1
        assert sampler.metrics() == {"sampling/num_rebuilds": 0, "time/sync_seconds": 0.0}
        said = f"sampler: the server at {server.url} is gone or silent"
        assert capsys.readouterr().out.startswith(said)
    finally:
        sampler.close()
        server.kill()


@pytest.mark.parametrize("moment", ["generate", "sync"])
def test_a_server_that_is_stopped_is_reported_in_time(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)
    policy = make_policy(tied=True)
    server = StandInProcess(policy.config)
    options = replace(OPTIONS, url=server.url, silence_seconds=1.0)
    sampler = VllmServerSampler(replace(make_spec(policy), options=options))
    try:
        sampler.sync_weights(policy_tensors(policy), 1)
        expected = sampler.generate([[5, 9]], PARAMS, seed=0)
        os.kill(server.process.pid, signal.SIGSTOP)
        silent = rf"^sampler: the server at {server.url} is gone or silent"
        with pytest.raises(SamplerFailed, match=silent):  # noqa: PT012 (one of two)
            if moment == "sync":
                sampler.sync_weights(policy_tensors(policy), 2)
            else:
                sampler.generate([[5, 9]], PARAMS, seed=0)
        os.kill(server.process.pid, signal.SIGCONT)
        sampler.sync_weights(policy_tensors(policy), 1)
        assert sampler.generate([[5, 9]], PARAMS, seed=0) == expected
    finally:
        sampler.close()
        server.kill()


def test_an_engine_that_hangs_among_its_completions_is_reported_in_time(
    served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server still answers."""
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)
    policy = make_policy(tied=True)
    options = replace(OPTIONS, url=served[0], silence_seconds=1.0)
    sampler = VllmServerSampler(replace(make_spec(policy), options=options))
    sampler.sync_weights(policy_tensors(policy), 1)
    on, done = threading.Event(), list[int]()
    sampler._on_progress = done.append

    def count(what: str) -> None:
        if what == "completion":
            number = next(numbers)
            assert number < 2 or on.wait(60)

    numbers = itertools.count()
    monkeypatch.setattr(served[1], "count", count)
    with pytest.raises(SamplerFailed, match=r"showed no progress for 1 seconds"):
        sampler.generate([[5, 9]] * 3, PARAMS, seed=0)
    assert max(done, default=0) > 0
    on.set()
    sampler.close()
