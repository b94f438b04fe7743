"""Runs that sample by an engine of their own: exact, resumable, and repeated where it died."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastalign.models import save_model
from fastalign.rollouts import (
    EngineSpec,
    PolicyAccess,
    SamplerFailed,
    SamplerName,
    SamplingParams,
    SyncedSampler,
    VllmServerSampler,
    policy_tensors,
)
from fastalign.trainers import OnlineDPOConfig, PPOConfig, train_online_dpo, train_ppo
from fastalign.trainers.sampling import policy_sampler as policy_sampler_module
from tests import rank_processes as ranks
from tests.rank_processes import free_port
from tests.ranks.test_ranks import FSDP, lora
from tests.rollouts.test_synced import FakeEngine
from tests.rollouts.vllm_cases import (
    OPTIONS,
    Server,
    make_policy,
    needs_vllm,
    nothing_left_in_shared_memory,
    process_named,
)
from tests.runs.test_resume import assert_same_run
from tests.small_runs import OPTIM, ppo_config, read_metrics
from tests.tokenizers import make_tokenizer

DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def _known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep vLLM's cache of models' descriptions, without which each start imports vLLM twice."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(Path.home() / ".cache/vllm"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all runs that leave their engine in peace."""
    folder = tmp_path_factory.mktemp("served")
    save_model(make_policy(), make_tokenizer(), folder)
    with pytest.MonkeyPatch.context() as environment, nothing_left_in_shared_memory():
        environment.setenv("OMP_NUM_THREADS", "1")  # sums are repeatable
        running = Server(folder, free_port())
        yield running
        running.stop()


def vllm_config(
    folder: Path,
    run: str,
    sampler: SamplerName = "vllm-server",
    server: Server | None = None,
    **train: Any,
) -> PPOConfig:
    """PPO on a model that vLLM's attention takes; without a server the run starts its own."""
    save_model(make_policy(), make_tokenizer(), folder / "llama")
    config = ppo_config(folder, run, **({"max_steps": 8} | train))
    found = {} if server is None else {"url": server.url, "token_file": server.token_file}
    return replace(config, sampler=sampler, vllm=replace(OPTIONS, **found))


@needs_vllm
def test_ppo_samples_from_the_weights_of_each_step_and_resumes_to_the_bit(
    folder: Path, server: Server
) -> None:
    train_ppo(vllm_config(folder, "straight", server=server))
    rows = read_metrics(folder / "straight")
    assert [row["sampling/policy_version"] for row in rows] == list(range(8))
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    assert all(row["time/sync_seconds"] > 0 for row in rows)
    train_ppo(vllm_config(folder, "resumed", server=server, stop_at_step=3))
    train_ppo(vllm_config(folder, "resumed", server=server, resume=True))
    assert_same_run(folder / "straight", folder / "resumed")


@needs_vllm
def test_a_step_whose_engine_is_killed_is_repeated(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ppo(vllm_config(folder, "undisturbed", server=server, max_steps=2))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    generate, calls = VllmServerSampler.generate, []

    def disturbed(self: VllmServerSampler, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.process_id)
        if len(calls) == 3:  # the scale of scores, the first step, the second
            process_named("engine", self.process_id).kill()
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(VllmServerSampler, "generate", disturbed)
    train_ppo(vllm_config(folder, "disturbed", max_steps=2))
    first, second = (read_metrics(folder / name) for name in ("undisturbed", "disturbed"))
    assert [row["sampling/num_rebuilds"] for row in second] == [0, 1]
    assert not any(psutil.pid_exists(supervisor) for supervisor in calls)
    for before, after in zip(first, second, strict=True):
        for name in ("loss", "objective/kl", "objective/scores", "grad_norm"):
            assert before[name] == after[name]


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
    config = vllm_config(folder, "run", server=server)
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
        made = vllm_config(folder, run, server=server, eval_every=3, **train)
        ppo = replace(made.ppo, max_importance_weight=2.0)
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
def test_an_engine_that_is_killed_in_the_background_costs_no_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = vllm_config(folder, "killed", max_steps=3)
    config = replace(
        made,
        ppo=replace(made.ppo, max_importance_weight=2.0),
        vllm=replace(OPTIONS, overlap=True),
    )
    generate = VllmServerSampler.generate

    def disturbed(self: VllmServerSampler, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and not killed:
            killed.append(self.process_id)
            process_named("engine", self.process_id).kill()
        return generate(self, *args, **kwargs)

    killed: list[int] = []
    monkeypatch.setattr(VllmServerSampler, "generate", disturbed)
    train_ppo(config)
    assert len(killed) == 1
    rows = read_metrics(folder / "killed")
    # The second step's were drawn anew, from the policy as it was then.
    assert [row["sampling/policy_version"] for row in rows] == [0, 1, 1]
    assert [row["sampling/num_rebuilds"] for row in rows] == [0, 1, 0]


@needs_vllm
@pytest.mark.parametrize("change", [lambda config: config, lora], ids=["whole", "adapter"])
def test_ranks_sample_by_one_engine(
    folder: Path, server: Server, change: Callable[[Any], Any]
) -> None:
    """Of shards of a policy; rank 0 starts a server, or finds one, and drives it for all."""
    found = server if change is lora else None
    shared = change(vllm_config(folder, "shared", server=found, max_steps=3))
    ranks.run(2, folder / "logs", train_ppo, replace(shared, parallel=FSDP))
    rows = read_metrics(folder / "shared")
    assert [row["sampling/policy_version"] for row in rows] == [0, 1, 2]
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    assert all(row["time/sync_seconds"] > 0 for row in rows)


def with_fake_engine(
    monkeypatch: pytest.MonkeyPatch, fail_at: list[str]
) -> Callable[..., SyncedSampler]:
    def open_fake(name: str, spec: EngineSpec, policy: PolicyAccess) -> SyncedSampler:
        model = policy._model
        engine = FakeEngine(fail_at)
        engine.model = type(model)(model.config).eval()
        engine.sync_weights(policy_tensors(model), 0)
        engine.calls.clear()
        return SyncedSampler(policy, engine, num_rebuilds=0, max_difference=1e-3)

    monkeypatch.setattr(policy_sampler_module, "open_engine", open_fake)
    return open_fake


@pytest.mark.parametrize("moment", ["rollouts", "evaluation"])
def test_a_sampler_that_fails_for_good_ends_a_run_that_is_saved(
    folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str, **options: Any) -> PPOConfig:
        made = replace(ppo_config(folder, run, **options), sampler="vllm")
        return replace(made, reward=replace(made.reward, normalise=False))

    with_fake_engine(monkeypatch, [])
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
    base = vllm_config(folder, "unused", server=server)
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
    with pytest.raises(ValueError, match=r"ppo\.max_importance_weight: expected a number"):
        replace(config, sampler="vllm-server", vllm=overlap)


def test_the_sampler_that_is_gone_is_refused_by_name(folder: Path) -> None:
    gone = r"sampler: vllm-process is gone; use vllm-server \(started by the run\) or vllm"
    with pytest.raises(ValueError, match=gone):
        replace(ppo_config(folder, "run"), sampler="vllm-process")
