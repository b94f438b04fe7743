"""A server found by its URL: weights, answers; gone, restarted, foreign, or another run's."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from fastalign.cli.settings import ServedModel, VllmServerConfig
from fastalign.cli.vllm_server import main
from fastalign.models.lora_files import save_adapter
from fastalign.rollouts import (
    SamplerFailed,
    VllmServerSampler,
    policy_tensors,
)
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.weights import write_tensors
from tests.rank_processes import free_port
from tests.rollouts.vllm_cases import (
    OPTIONS,
    PARAMS,
    TRUNCATED,
    Server,
    Servers,
    assert_a_sync_counts,
    assert_adapters_count,
    assert_same_answers,
    digest_of,
    largest_difference,
    make_policy,
    make_prompts,
    make_spec,
    needs_vllm,
    process_named,
    shared_memory,
)
from tests.tiny import put_adapter


@pytest.fixture
def server(vllm_servers: Servers) -> Server:
    return vllm_servers.first


def open_sampler(server: Server, policy: Any = None, **options: Any) -> VllmServerSampler:
    spec = make_spec(make_policy(tied=True) if policy is None else policy)
    chosen = {"url": server.url, "token_file": server.token_file, **options}
    return VllmServerSampler(replace(spec, options=replace(OPTIONS, **chosen)))


@needs_vllm
def test_a_sync_counts(server: Server) -> None:
    sampler = open_sampler(server)
    assert_a_sync_counts(sampler, make_policy(tied=True))
    assert not [name for name in shared_memory() if "fastalign" in name]
    policy = make_policy(tied=True)
    sampler.sync_weights(policy_tensors(policy), 3)
    found = sampler.generate(make_prompts(), TRUNCATED, seed=2)
    assert largest_difference(policy, found, TRUNCATED) < 1e-4
    assert_same_answers(found, sampler.generate(make_prompts(), TRUNCATED, seed=2))
    assert len({tuple(answer.token_ids) for answers in found for answer in answers}) == 8
    assert sampler.differing_tensors(policy_tensors(policy)) == ([], len(policy.state_dict()))
    with torch.no_grad():
        policy.model.layers[0].mlp.gate_proj.weight.mul_(1.2)
    names, _ = sampler.differing_tensors(policy_tensors(policy))
    assert names == ["model.layers.0.mlp.gate_proj.weight"]
    sampler.close()


@needs_vllm
def test_a_sync_over_the_network_counts(server: Server) -> None:
    sampler = open_sampler(server, transport="network")
    assert_a_sync_counts(sampler, make_policy(tied=True))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        sampler.sync_weights(
            (
                pair
                for pair in policy_tensors(make_policy(tied=True))
                if pair[0] != "lm_head.weight"
            ),
            3,
        )
    sampler.close()
    other = open_sampler(server, transport="network")  # a new group, with the same workers
    assert_a_sync_counts(other, make_policy(tied=True))
    other.close()


@needs_vllm
def test_adapters_are_synced_alone(server: Server, tmp_path: Path) -> None:
    policy = put_adapter(make_policy(tied=True), "all-linear", rank=3)
    sampler = open_sampler(server, make_policy(tied=True))
    assert_adapters_count(sampler, policy, tmp_path)
    sampler.close()


def elsewhere(monkeypatch: pytest.MonkeyPatch, method: str, folder: Path) -> None:
    """What the trainer writes, the server looks for in another folder, as in another container."""
    call_all = ServerConnection.call_all

    def misled(self: ServerConnection, name: str, *arguments: str) -> list[str]:
        if name == method:
            arguments = (str(folder), *arguments[1:])
        return call_all(self, name, *arguments)

    monkeypatch.setattr(ServerConnection, "call_all", misled)


@needs_vllm
def test_a_server_that_reads_nothing_or_something_else_fails_the_sync(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, sampler = make_policy(tied=True), open_sampler(server)
    sampler.sync_weights(policy_tensors(policy), 1)
    tensors = list(policy_tensors(policy))
    other = tmp_path / "other"
    other.mkdir()
    write_tensors([*tensors[1:], (tensors[0][0], tensors[0][1] + 1e-6)], other)
    for number, folder in {0: tmp_path / "none", len(tensors): other}.items():
        with monkeypatch.context() as patch:
            elsewhere(patch, "load", folder)
            with pytest.raises(ValueError, match=r"^vllm\.sync_folder: ") as failure:
                sampler.sync_weights(policy_tensors(policy), 2)
        said = str(failure.value)
        assert f"the server at {server.url} read {number} tensors or files in /dev/shm/" in said
        assert f"expected the {len(tensors)} written there ({digest_of(policy)})" in said
        assert "both see (--vllm.sync-folder), or use --vllm.transport network" in said
        with pytest.raises(SamplerFailed, match="no weights"):
            sampler.generate(make_prompts(), PARAMS, seed=0)
    sampler.sync_weights(policy_tensors(policy), 3)
    adapted = put_adapter(make_policy(tied=True), "q_proj", rank=3)
    save_adapter(adapted, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        elsewhere(patch, "adapted", tmp_path / "none")
        with pytest.raises(ValueError, match=r"read 0 tensors or files .* the 2 written there"):
            sampler.sync_adapter(tmp_path / "adapter", 4)
    sampler.close()


@needs_vllm
def test_texts_of_other_weights_than_the_trainer_s_are_not_used(server: Server) -> None:
    sampler = open_sampler(server)
    sampler.sync_weights(policy_tensors(make_policy(tied=True)), 1)
    sampler._digest = digest_of(make_policy(tied=True, seed=1))
    with pytest.raises(SamplerFailed, match="started again, or is used by another run"):
        sampler.generate(make_prompts(), PARAMS, seed=0)
    sampler.close()


class Noise:
    """A group of ranks in which a tensor arrives as another."""

    def __init__(self, group: Any):
        self.group = group

    def broadcast(self, tensor: torch.Tensor, rank: int) -> Any:
        return self.group.broadcast(tensor * (1 + 1e-6), rank)


@needs_vllm
def test_other_tensors_than_were_sent_over_the_network_fail_the_sync(server: Server) -> None:
    policy, sampler = make_policy(tied=True), open_sampler(server, transport="network")
    sampler.sync_weights(policy_tensors(policy), 1)
    broadcaster = sampler.servers[0]._broadcaster
    assert broadcaster is not None
    broadcaster.group.inner = Noise(broadcaster.group.inner)
    with pytest.raises(SamplerFailed, match="took other weights than were sent: expected"):
        sampler.sync_weights(policy_tensors(policy), 2)
    assert sampler.version is None
    sampler.close()


@needs_vllm
def test_what_is_not_a_trainer_is_refused(server: Server, tmp_path: Path) -> None:
    open_sampler(server).close()  # it listens
    token = Path(server.token_file).read_text().strip()
    ours = {"authorization": f"Bearer {token}"}
    steal = {"method": "save_sharded_state", "args": [str(tmp_path / "stolen")]}
    for path in ("/collective_rpc", "/v1/completions", "/fastalign/load", "/health", "/docs"):
        answer = httpx2.post(server.url + path, json=steal)
        assert answer.status_code == 401, path
        answer = httpx2.post(server.url + path, json=steal, headers={**ours, "origin": "null"})
        assert answer.status_code == 403, path
    others = ["/collective_rpc", "/update_weights", "/pause", "/reset_prefix_cache", "/tokenize"]
    others += ["/invocations", "/v1/chat/completions", "/fastalign/save_sharded_state"]
    for path in others:
        assert httpx2.post(server.url + path, json=steal, headers=ours).status_code == 404, path
    plain = {**ours, "content-type": "text/plain"}
    state, body = f"{server.url}/fastalign/state", b'{"arguments": []}'
    assert httpx2.post(state, content=body, headers=plain).status_code == 415
    assert not (tmp_path / "stolen").exists()
    command = " ".join(process_named("api", server.process.pid).cmdline())
    assert token not in command + (server.folder / f"{server.port}.log").read_text()
    (tmp_path / "wrong").write_text("wrong")
    (tmp_path / "wrong").chmod(0o600)
    for file, said in (("wrong", "refuses this token"), ("none", "asks for a token")):
        with pytest.raises(ValueError, match=rf"the server at .* {said}; expected its own in"):
            open_sampler(server, token_file=str(tmp_path / file))


@needs_vllm
def test_another_run_at_the_same_server_is_noticed(server: Server) -> None:
    first, second = open_sampler(server), open_sampler(server)
    first.sync_weights(policy_tensors(make_policy(tied=True)), 1)
    second.sync_weights(policy_tensors(make_policy(tied=True, seed=1)), 1)
    with pytest.raises(SamplerFailed, match="started again, or is used by another run"):
        first.generate(make_prompts(), PARAMS, seed=0)
    first.close()
    second.close()


@needs_vllm
def test_another_model_is_refused(server: Server) -> None:
    policy = make_policy(tied=True)
    policy.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="another model: expected num_hidden_layers 3, got 2"):
        open_sampler(server, policy)


@needs_vllm
def test_a_port_in_use_is_said_before_anything_is_loaded(server: Server) -> None:
    open_sampler(server).close()  # it listens
    with pytest.raises(ValueError, match=f"listen at 127.0.0.1:{server.port} .*in use"):
        main(VllmServerConfig(ServedModel(str(server.folder)), port=server.port))


@needs_vllm
def test_a_folder_without_a_model_is_said_before_a_server_is_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: no model can be loaded from"):
        main(VllmServerConfig(ServedModel(str(tmp_path)), port=free_port()))


def test_no_server_is_said_in_time() -> None:
    spec = make_spec(make_policy())
    options = replace(OPTIONS, url=f"http://127.0.0.1:{free_port()}", start_seconds=0.5)
    with pytest.raises(SamplerFailed, match=r"no vLLM server .* in 0\.5 seconds .*vllm-server"):
        VllmServerSampler(replace(spec, options=options))


class Foreign(BaseHTTPRequestHandler):
    """A vLLM server that somebody started without the way to its weights."""

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "m", "max_model_len": 64}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_takes_no_weights_is_refused() -> None:
    with HTTPServer(("127.0.0.1", 0), Foreign) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        spec = make_spec(make_policy())
        options = replace(OPTIONS, url=f"http://127.0.0.1:{other.server_port}")
        with pytest.raises(ValueError, match=r"takes no weights; .*`fastalign vllm-server`"):
            VllmServerSampler(replace(spec, options=options))
        other.shutdown()
