"""Runs that sample by an engine of their own: exact, resumable, and repeated where it died."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.models.load import save_model
from fastalign.rollouts import (
    EngineSpec,
    PolicyAccess,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    VllmServerSampler,
    policy_tensors,
)
from fastalign.rollouts.engines import weights
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.trainers import OnlineDPOConfig, PPOConfig, Truncated, train_online_dpo, train_ppo
from fastalign.trainers.sampling import rollout as rollout_module
from tests import rank_processes as ranks
from tests.ranks.test_ranks import FSDP, lora
from tests.rollouts.test_synced import FakeEngine
from tests.rollouts.vllm_cases import (
    OPTIONS,
    Server,
    Servers,
    make_policy,
    needs_vllm,
    process_named,
)
from tests.runs.test_resume import assert_same_run
from tests.small_runs import OPTIM, ppo_config, read_metrics
from tests.tokenizers import make_tokenizer

DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture
def server(vllm_servers: Servers) -> Server:
    """One server for all runs that leave their engine in peace."""
    return vllm_servers.first


def vllm_config(folder: Path, run: str, *servers: Server, **train: Any) -> PPOConfig:
    """PPO on a model that vLLM's attention takes."""
    save_model(make_policy(tied=True), make_tokenizer(), folder / "llama")
    config = ppo_config(folder, run, **({"max_steps": 8} | train))
    urls = tuple(server.url for server in servers)
    vllm = replace(OPTIONS, url=urls, token_file=servers[0].token_file)
    return replace(config, sampler="vllm-server", vllm=vllm)


@needs_vllm
def test_ppo_samples_from_the_weights_of_each_step_and_resumes_to_the_bit(
    folder: Path, server: Server
) -> None:
    train_ppo(vllm_config(folder, "straight", server))
    rows = read_metrics(folder / "straight")
    assert [row["sampling/policy_version"] for row in rows] == list(range(8))
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    assert all(row["time/sync_seconds"] > 0 for row in rows)
    train_ppo(vllm_config(folder, "resumed", server, stop_at_step=3))
    train_ppo(vllm_config(folder, "resumed", server, resume=True))
    assert_same_run(folder / "straight", folder / "resumed")


@needs_vllm
def test_a_run_whose_engine_keeps_an_old_tensor_stops_and_names_it(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, first = VllmServerSampler.sync_weights, {}

    def forgetful(self: VllmServerSampler, named_tensors: Any, version: int) -> None:
        tensors = {name: tensor.clone() for name, tensor in named_tensors}
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = first.setdefault(name, tensors[name])
        sync(self, tensors.items(), version)

    monkeypatch.setattr(VllmServerSampler, "sync_weights", forgetful)
    config = vllm_config(folder, "run", server)
    with pytest.raises(
        SamplerFailed,
        match=r"nats a token off .* it does not compute with: "
        r"model\.layers\.1\.mlp\.down_proj\.weight\nstep \d is saved",
    ):
        train_ppo(replace(config, optim=replace(config.optim, lr=3e-2, warmup_steps=0)))


@needs_vllm
def test_rollouts_that_overlap_are_one_step_old_weighted_and_resumed_to_the_bit(
    folder: Path, server: Server
) -> None:
    def config(run: str, **train: Any) -> PPOConfig:
        made = vllm_config(folder, run, server, eval_every=3, **train)
        ppo = replace(made.ppo, importance=Truncated())
        return replace(made, ppo=ppo, vllm=replace(made.vllm, overlap=True))

    train_ppo(config("straight"))
    rows = read_metrics(folder / "straight")
    assert [row["sampling/policy_version"] for row in rows] == [0, *range(7)]
    assert rows[0]["sampling/importance_sampling_ratio/max"] < 1.001
    assert min(row["sampling/importance_sampling_ratio/max"] for row in rows[1:]) > 1.01
    assert all(row["val/ratio"] != 1 for row in rows)
    train_ppo(config("resumed", stop_at_step=4))
    assert (folder / "resumed/checkpoints/step-000004/rollouts.json").is_file()
    train_ppo(config("resumed", resume=True))
    assert_same_run(folder / "straight", folder / "resumed")


@needs_vllm
@pytest.mark.parametrize("change", [lambda config: config, lora], ids=["whole", "adapter"])
def test_ranks_sample_by_one_engine(
    folder: Path, server: Server, change: Callable[[Any], Any]
) -> None:
    """Of shards of a policy; rank 0 finds a server, and drives it for all."""
    shared = change(vllm_config(folder, "shared", server, max_steps=3))
    ranks.run(2, folder / "logs", train_ppo, replace(shared, parallel=FSDP))
    rows = read_metrics(folder / "shared")
    assert [row["sampling/policy_version"] for row in rows] == [0, 1, 2]
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    assert all(row["time/sync_seconds"] > 0 for row in rows)


def with_fake_engine(monkeypatch: pytest.MonkeyPatch, num_rebuilds: int = 0) -> None:
    def open_fake(name: str, spec: EngineSpec, policy: PolicyAccess, **_: Any) -> SyncedSampler:
        model = policy._model
        engine = FakeEngine()
        engine.model = type(model)(model.config).eval()
        engine.sync_weights(policy_tensors(model), 0)
        engine.calls.clear()
        return SyncedSampler(policy, engine, num_rebuilds=num_rebuilds, max_difference=1e-3)

    monkeypatch.setattr(rollout_module, "open_engine", open_fake)


def test_a_step_whose_engine_fails_is_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str) -> PPOConfig:
        return replace(ppo_config(folder, run), sampler="vllm")

    with_fake_engine(monkeypatch, num_rebuilds=1)
    train_ppo(config("straight"))
    calls = 0

    def fail(self: FakeEngine, name: str) -> None:
        nonlocal calls
        calls += name == "generate"
        if name == "generate" and calls == 3:  # the scale of scores, the first step, the second
            raise SamplerFailed("sampler: it is gone")
        if name == "rebuild":  # it has no weights, and some of its own
            self.model.load_state_dict({k: -v for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(FakeEngine, "_call", fail)
    train_ppo(config("failed"))
    rows = read_metrics(folder / "failed")
    assert [row["sampling/num_rebuilds"] for row in rows] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert [row["sampling/policy_version"] for row in rows] == list(range(8))
    assert_same_run(folder / "straight", folder / "failed", apart_from=["sampling/num_rebuilds"])


def test_an_engine_that_fails_in_the_background_costs_no_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ppo_config(folder, "failed", max_steps=3)
    config = replace(
        made,
        ppo=replace(made.ppo, importance=Truncated()),
        sampler="vllm-server",
        vllm=replace(OPTIONS, overlap=True),
    )
    failed: list[str] = []

    def fail(self: FakeEngine, name: str) -> None:
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(name)
            self.version = None
            raise SamplerFailed("sampler: it is gone")

    with_fake_engine(monkeypatch, num_rebuilds=1)
    monkeypatch.setattr(FakeEngine, "_call", fail)
    train_ppo(config)
    assert failed == ["generate"]
    rows = read_metrics(folder / "failed")
    # The second step's were drawn anew, from the policy as it was then.
    assert [row["sampling/policy_version"] for row in rows] == [0, 1, 1]


@pytest.mark.parametrize("moment", ["rollouts", "evaluation"])
def test_a_sampler_that_fails_for_good_ends_a_run_that_is_saved(
    folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str, **options: Any) -> PPOConfig:
        made = replace(ppo_config(folder, run, **options), sampler="vllm")
        return replace(made, reward=replace(made.reward, normalise=False))

    with_fake_engine(monkeypatch)
    train_ppo(config("straight"))
    calls = 0

    def fail(self: FakeEngine, name: str) -> None:
        nonlocal calls
        calls += name == "generate"
        if name == "generate" and calls == (4 if moment == "rollouts" else 9):
            raise SamplerFailed("sampler: it is gone")

    monkeypatch.setattr(FakeEngine, "_call", fail)
    step = 3 if moment == "rollouts" else 8
    with pytest.raises(SamplerFailed, match=rf"it is gone\nstep {step} is saved, go on with"):
        train_ppo(config("failed"))
    rows = read_metrics(folder / "failed")
    assert [row["step"] for row in rows] == list(range(1, step + 1))
    if moment == "rollouts":
        train_ppo(config("failed", resume=True))
        assert_same_run(folder / "straight", folder / "failed")


@needs_vllm
def test_online_dpo_checks_what_it_samples(folder: Path, server: Server) -> None:
    base = vllm_config(folder, "unused", server)
    config = OnlineDPOConfig(
        model=base.model,
        data=base.data,
        reward=base.reward,
        run=replace(base.run, dir=str(folder / "online")),
        sampling=SamplingParams(max_new_tokens=6, num_samples=3, temperature=0.7, top_p=0.9),
        sampler="vllm-server",
        vllm=base.vllm,
        optim=OPTIM,
        train=replace(base.train, max_steps=2),
    )
    train_online_dpo(config)
    rows = read_metrics(folder / "online")
    assert [row["sampling/policy_version"] for row in rows] == [0, 1]
    assert max(row[DIFFERENCE] for row in rows) < 1e-4


@pytest.mark.parametrize("make", [ppo_config])
def test_settings_of_an_engine_that_is_not_asked_for_are_refused(folder: Path, make: Any) -> None:
    with pytest.raises(ValueError, match=r"vllm\.eager: True is a setting of vLLM; expected"):
        replace(make(folder, "run"), vllm=replace(OPTIONS, kv_cache_gib=0.5, eager=True))


def test_overlap_is_for_ppo_with_an_engine_outside_of_the_trainer(folder: Path) -> None:
    config, overlap = ppo_config(folder, "run"), replace(OPTIONS, overlap=True)
    with pytest.raises(ValueError, match=r"vllm\.overlap: an engine in the trainer's process"):
        replace(config, sampler="vllm", vllm=overlap)
    with pytest.raises(ValueError, match=r"ppo\.importance: expected truncated"):
        replace(config, sampler="vllm-server", vllm=overlap)


def test_the_sampler_that_is_gone_is_refused_by_name(folder: Path) -> None:
    gone = r"sampler: vllm-process is gone; use vllm-server \(started by the run\) or vllm"
    with pytest.raises(ValueError, match=gone):
        replace(ppo_config(folder, "run"), sampler="vllm-process")


@needs_vllm
def test_a_run_on_two_servers_of_which_one_fails_and_one_is_killed_ends_with_the_same_bits(
    folder: Path,
    vllm_servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second's completions are lost, and it is used again; the first is killed in a sync.

    A server that is killed among its completions, or comes back without weights: stand-ins, in
    `test_runs_of_several_servers` and `test_several_servers`.
    """
    first, second = vllm_servers.first, vllm_servers.second
    train_ppo(vllm_config(folder, "straight", first, second))
    rows = read_metrics(folder / "straight")
    assert {row["sampling/num_servers"] for row in rows} == {2}
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    capsys.readouterr()
    sync, write = VllmServerSampler.sync_weights, weights.write_tensors
    post_all, versions = ServerConnection.post_all, []

    async def losing_post(self: ServerConnection, *arguments: Any) -> Any:
        answers = await post_all(self, *arguments)
        if self.url == second.url and versions[-1] == 1:
            raise SamplerFailed(f"sampler: {self.name} is gone or silent")
        return answers

    def killing_write(*arguments: Any) -> None:
        write(*arguments)
        if versions[-1] == 5:  # the weights are written, the servers have not read them
            process_named("engine", first.process.pid).kill()

    def syncing(self: VllmServerSampler, named_tensors: Any, version: int) -> None:
        versions.append(version)
        sync(self, named_tensors, version)

    monkeypatch.setattr(ServerConnection, "post_all", losing_post)
    monkeypatch.setattr("fastalign.rollouts.engines.server.write_tensors", killing_write)
    monkeypatch.setattr(VllmServerSampler, "sync_weights", syncing)
    train_ppo(vllm_config(folder, "killed", first, second))
    said = capsys.readouterr().out.splitlines()
    said = [line for line in said if line.startswith("sampler: the server at ")]
    left_out = "it is left out and its work repeated by the others (1 of 2 servers are left)"
    assert [line.endswith(left_out) for line in said] == [True, False, True]
    for server, line in zip((second, second, first), said, strict=True):
        assert line.startswith(f"sampler: the server at {server.url} ")
    assert said[1].endswith(" is used again")
    rows = read_metrics(folder / "killed")
    assert [row["sampling/num_servers"] for row in rows] == [2, 1, 2, 2, 2, 1, 1, 1]
    assert [row["sampling/num_lost_servers"] for row in rows] == [0, 1, 0, 0, 0, 1, 0, 0]
    of_servers = ["sampling/num_servers", "sampling/num_lost_servers", "eval_sampling/num_servers"]
    assert_same_run(folder / "straight", folder / "killed", apart_from=of_servers)
    first.process.join(60)  # a test that needs it starts it again
