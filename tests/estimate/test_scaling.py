"""The estimated memory of a rank is what two and three ranks hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.cli.estimate import as_record
from fastalign.cli.main import main
from fastalign.compute import Compute
from fastalign.estimate.ranks import (
    ModelWeights,
    gathered,
    kept,
    reducing,
    shard_size,
    weights_of,
)
from fastalign.estimate.run import estimate_run
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import World
from tests.estimate import scaling_worker
from tests.estimate.scaling_cases import CASES, HEAVY, PEAKS, Case
from tests.rank_processes import run
from tests.small_runs import dpo_config
from tests.tiny import put_adapter, tiny_model

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By the number of ranks, what each counted: three processes for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    run(3, folder, scaling_worker.main, folder)
    return {
        size: [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        for size in (2, 3)
    }


def shared_by(
    ranks: int, dtype: torch.dtype = torch.float32, parallel: ParallelConfig | None = None
) -> Compute:
    return Compute(dtype=dtype, world=World(size=ranks), parallel=parallel or ParallelConfig())


def sharing_of(case: Case, ranks: int) -> Compute:
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    return shared_by(ranks, dtype, ParallelConfig(**case.settings))


def model_of(case: Case) -> ModelWeights:
    model = tiny_model("llama")
    return weights_of(put_adapter(model, "q_proj", "down_proj") if case.adapter else model)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_ranks_keep(name: str, ranks: int, found: Found) -> None:
    case = CASES[name]
    model, sharing = model_of(case), sharing_of(case, ranks)
    counted = found[ranks][0][name]
    expected = kept(model, sharing)  # behind the last batch, no gradient is whole
    assert counted["weights"] == expected.weights
    assert counted["gradients"] == expected.gradients
    assert counted["states"] == expected.states


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_fullest_moment_of_shards_is_below_ddps_and_within_the_bound(
    ranks: int, found: Found
) -> None:
    with torch.device("meta"):
        model = weights_of(LlamaForCausalLM(LlamaConfig(**HEAVY)))
    peaks = {name: found[ranks][0][f"peak, {name}"]["peak"] for name in PEAKS}
    activations = peaks["ddp"] - kept(model, shared_by(ranks)).total
    assert 0 < activations < 0.01 * peaks["ddp"]
    for name in PEAKS.keys() - {"ddp"}:
        sharing = sharing_of(PEAKS[name], ranks)
        own = kept(model, sharing, batches=PEAKS[name].batches).total
        most = own + gathered(model, sharing) + reducing(model, sharing)
        assert own < peaks[name] < most + activations, name
    assert peaks["fsdp"] < 1.5 * peaks["ddp"] / ranks
    layers = sum(4 * weight.numel() for layer in model.layers for weight in layer)
    assert peaks["fsdp, gathered"] > peaks["fsdp"] + 0.25 * layers


def test_settings_change_what_they_say() -> None:
    model = weights_of(tiny_model("llama"))

    def of(**settings: Any) -> Compute:
        return shared_by(2, torch.bfloat16, ParallelConfig(strategy="fsdp", **settings))

    plain, open_, late = of(), of(reshard_after_forward=False), of(no_sync=True)
    assert gathered(model, open_) == gathered(model, plain, whole=True) > gathered(model, plain)
    assert kept(model, late, batches=1) == kept(model, plain, batches=3)
    more = kept(model, late, batches=3).gradients - kept(model, plain).gradients
    assert more == 4 * sum(weight.numel() - shard_size(weight, 2) for weight in model.all)
    ddp = shared_by(2, torch.bfloat16)
    assert gathered(model, ddp) == reducing(model, ddp) == 0
    frozen = weights_of(tiny_model("llama").requires_grad_(False))
    assert kept(frozen, plain).total == kept(frozen, plain).weights
    assert reducing(frozen, plain) == 0


def test_a_runs_estimate_knows_its_ranks(folder: Path) -> None:
    config = dpo_config(folder, "run", tokens_per_batch=40)
    alone, ddp = estimate_run(config), estimate_run(config, 2)
    assert ddp.ranks == 2
    assert as_record(ddp)["batches_of_a_rank"] == -(-ddp.num_batches // 2) > 1
    step, one = ddp.phases["training step"], alone.phases["training step"]
    assert (step.weights, step.states, step.buckets) == (one.weights, one.states, one.states // 2)
    config = replace(config, parallel=ParallelConfig(strategy="fsdp"))
    fsdp = estimate_run(config, 2)
    assert fsdp.ranks == 2
    model = weights_of(tiny_model("llama", vocab_size=320))
    sharing = shared_by(2, parallel=config.parallel)
    own, step = kept(model, sharing), fsdp.phases["training step"]
    buffers = one.weights - kept(model, shared_by(1)).weights
    assert (step.weights, step.gradients) == (own.weights + buffers, own.gradients)
    assert (step.states, step.gathered) == (own.states, gathered(model, sharing))
    other = replace(config, reference=replace(config.reference, path=config.model.path))
    beside = estimate_run(other, 2).phases["reference log-probs"]
    assert beside.weights == 2 * own.weights + buffers
    assert beside.states == beside.gradients == beside.reducing == 0


def test_ranks_are_asked_for_at_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in (folder / "llama").glob("*.safetensors"):
        weights.unlink()  # none is read
    words = ["--model.path", str(folder / "llama"), "--data.train", str(folder / "texts.jsonl")]
    words += ["--run.dir", str(folder / "run"), "--train.device", "cpu"]
    output = folder / "estimate.json"
    shared = ["--ranks", "2", "--parallel.strategy", "fsdp", "--json", str(output)]
    assert main(["estimate", "sft", *words, *shared]) == 0
    said = capsys.readouterr().out
    assert "MiB, each of 2 ranks" in said
    assert "gathered weights, at most" in said
    assert "a rank fits" in said
    record = json.loads(output.read_text())
    assert record["ranks"] == 2
    assert record["phases"]["training step"]["gathered_bytes"] > 0
    for bad in ("0", "two", "-1"):
        assert main(["estimate", "sft", *words, f"--ranks={bad}"]) == 2
        assert f"--ranks: expected a number of at least 1, got '{bad}'" in capsys.readouterr().err
    assert main(["estimate", "sft", *words, "--optim.states", "8bit", *shared, "--overwrite"]) == 2
    assert "optim.states: 8bit states are not sharded" in capsys.readouterr().err
