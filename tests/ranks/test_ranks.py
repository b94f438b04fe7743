"""Several ranks do what one does: the same losses and weights, to float32 rounding."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_reward_model
from fastalign.models.lora_files import save_adapter
from fastalign.ranks.config import ParallelConfig
from fastalign.runs.config import LoraConfig, config_to_dict
from fastalign.runs.folder import as_yaml
from fastalign.trainers import (
    train_dpo,
    train_online_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from tests import rank_processes as ranks
from tests.small_runs import (
    dpo_config,
    ppo_config,
    read_metrics,
    reward_config,
    scored_by_answers,
    sft_config,
    taught,
)
from tests.tiny import put_adapter
from tests.trainers.online_dpo.test_online_dpo import RENEWED, online_config

TRAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sft": (sft_config, train_sft),
    "dpo": (dpo_config, train_dpo),
    "reward": (reward_config, train_reward),
    "ppo": (ppo_config, train_ppo),
    "online-dpo": (online_config, train_online_dpo),
}
NUM_STEPS = 5
# Depends on the clock, the process, or how a step is cut into batches.
NOT_COMPARED = ("_seconds", "peak_memory", "per_second", "fill_rate", "num_micro_batches")


@dataclass(frozen=True)
class Case:
    """A run of `num_ranks` with some settings, which a run of one process has too."""

    trainer: str
    num_ranks: int
    parallel: ParallelConfig
    train: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda config: config

    def config(self, folder: Path, run: str, **parallel: Any) -> Any:
        make, _ = TRAINERS[self.trainer]
        train = {"tokens_per_batch": 40, "max_steps": NUM_STEPS}
        config = make(folder, run, **(train | self.train))
        return replace(self.change(config), **parallel)


def exact_kl(config: Any) -> Any:
    return replace(config, kl=replace(config.kl, estimator="full"))


def lora(config: Any) -> Any:
    adapter = LoraConfig(rank=4, alpha=8.0, targets=("all-linear", "lm_head"))
    return replace(config, model=replace(config.model, lora=adapter))


def reward_lora(config: Any) -> Any:
    return replace(config, model=replace(config.model, lora=LoraConfig(rank=4, alpha=8.0)))


def weighted(config: Any) -> Any:
    """Return it with weights of tokens, which some rows have several of and others none."""
    loss = replace(config.loss, class_weights=("</s>:3", " b:0.25", "tery:2"))
    return replace(config, loss=loss)


def seeded(config: Any) -> Any:
    """Return it with a seed under which no token that is drawn lies within rounding of another."""
    return replace(config, run=replace(config.run, seed=1))


def shared_trunk(config: Any) -> Any:
    return replace(config, value=replace(config.value, share_policy=True, trunk_gradient=0.5))


def one_base(config: Any) -> Any:
    """Return it with every model on one base, the reward model's adapter beside the run's."""
    config = lora(config)
    base, adapter = Path(config.model.path), Path(config.run.dir).parent / "rm"
    if not adapter.exists():
        save_adapter(put_adapter(load_reward_model(base)), adapter)
        load_tokenizer(base).save_pretrained(adapter)
    return replace(
        config,
        ppo=replace(config.ppo, one_base=True),
        reward=replace(config.reward, sources=(*config.reward.sources, str(adapter))),
    )


DDP, FSDP = ParallelConfig(), ParallelConfig(strategy="fsdp")
CASES = {
    "sft, ddp": Case("sft", 2, DDP),
    "sft, ddp, class weights": Case("sft", 2, DDP, {"batch_size": 5}, weighted),
    "sft, fsdp, class weights": Case("sft", 3, FSDP, {"batch_size": 5}, weighted),
    "sft, ddp, teacher": Case("sft", 2, DDP, {"batch_size": 5}, taught),
    "sft, fsdp, teacher": Case("sft", 3, FSDP, {"batch_size": 5}, taught),
    "sft, fewer examples than ranks": Case("sft", 3, DDP, {"batch_size": 2}),
    "sft, fsdp, fewer examples than ranks": Case("sft", 3, FSDP, {"batch_size": 1}),
    "dpo, ddp": Case("dpo", 2, DDP, {"batch_size": 5}),
    "dpo, ddp, adapter": Case("dpo", 2, DDP, change=lora),
    "dpo, fsdp": Case("dpo", 3, FSDP, {"batch_size": 5}),
    "dpo, fsdp, adapter": Case("dpo", 2, FSDP, change=lora),
    "dpo, fsdp, whole gradients, checkpointed": Case(
        "dpo", 2, replace(FSDP, no_sync=True), {"gradient_checkpointing": True}
    ),
    "dpo, fsdp, weights kept, padded": Case(
        "dpo", 2, replace(FSDP, reshard_after_forward=False), {"packing": "padded"}
    ),
    "dpo, fsdp, offloaded": Case("dpo", 2, replace(FSDP, offload=True)),
    "reward, ddp": Case("reward", 2, DDP),
    "reward, fsdp": Case("reward", 3, FSDP),
    "reward, ddp, adapter": Case("reward", 2, DDP, change=reward_lora),
    "reward, fsdp, adapter": Case("reward", 2, FSDP, change=reward_lora),
    "ppo, ddp, rewards by the rows' answers": Case("ppo", 2, DDP, change=scored_by_answers),
    "ppo, fsdp, exact KL": Case("ppo", 3, FSDP, change=exact_kl),
    "ppo, fsdp, adapter": Case("ppo", 2, FSDP, change=lora),
    "ppo, ddp, shared trunk": Case("ppo", 2, DDP, change=shared_trunk),
    "ppo, fsdp, shared trunk, adapter": Case(
        "ppo", 2, FSDP, change=lambda config: shared_trunk(lora(config))
    ),
    "ppo, ddp, one base": Case("ppo", 2, DDP, change=one_base),
    "online-dpo, ddp": Case("online-dpo", 2, DDP),
    "online-dpo, fsdp": Case("online-dpo", 2, FSDP, RENEWED, seeded),
}


def trained(trainer: str, config: Any) -> None:
    result = TRAINERS[trainer][1](config)
    assert result.finished


def trained_by_a_rank(trainer: str, config: Any) -> None:
    """The same, with the packages alone that the process it is forked from has imported."""
    before = packages()
    trained(trainer, config)
    assert packages() == before, f"for tests/preloaded.py: {packages() - before}"


def packages() -> set[str]:
    """Return the names of the imported packages that are not Python's own."""
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names


def assert_near(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if any(part in name for part in NOT_COMPARED) or name == "eps":
            continue
        if name.endswith("accuracies"):  # one pair's margin may be next to nothing
            assert abs(one[name] - other[name]) < 0.26
            continue
        # A sampler's rounding differs with what shares its batch: that one is a difference of two.
        slack = 1e-5 if "logp_difference" in name else 2e-6
        close = math.isclose(float(one[name]), float(other[name]), rel_tol=2e-4, abs_tol=slack)
        assert close, (one["step"], name, one[name], other[name])


def assert_same_samples(one: Path, other: Path) -> None:
    """Compare rows of samples; a reward model's score differs with what shares its batch."""
    rows, others = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in (one, other)
    )
    assert len(rows) == len(others) > 0
    for row, same in zip(rows, others, strict=True):
        for name in ("reward", "rewards"):
            assert row.pop(name, 0.0) == pytest.approx(same.pop(name, 0.0), rel=1e-5)
        assert row == same


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_does(name: str, folder: Path) -> None:
    case = CASES[name]
    trained(case.trainer, case.config(folder, "one"))
    shared = case.config(folder, "shared", parallel=case.parallel)
    outputs = ranks.run(case.num_ranks, folder / "logs", trained_by_a_rank, case.trainer, shared)
    assert all("loss" not in output for output in outputs[1:])  # rank 0 speaks for all
    one, other = read_metrics(folder / "one"), read_metrics(folder / "shared")
    assert len(one) == len(other) == NUM_STEPS
    for rows in zip(one, other, strict=True):
        assert_near(*rows)
    if case.trainer in ("ppo", "online-dpo"):
        assert_same_samples(*(folder / run / "samples.jsonl" for run in ("one", "shared")))
    for file in sorted((folder / "one").rglob("*.safetensors")):
        path = file.relative_to(folder / "one")
        if path.parts[0] == "checkpoints":
            continue
        weights, theirs = load_file(file), load_file(folder / "shared" / path)
        assert weights.keys() == theirs.keys()
        for key, value in weights.items():
            # AdamW's first steps have the gradient's sign, so rounding there is a learning rate.
            assert (value - theirs[key]).abs().max() < 2e-4, (path, key)
        if path.parts[0] == "model":
            assert_same_config(folder / "one/model", folder / "shared/model")


@pytest.mark.parametrize("trainer", ["dpo", "ppo"])
def test_a_run_goes_on_on_other_ranks(trainer: str, folder: Path) -> None:
    make, train = TRAINERS[trainer]
    train(make(folder, "straight"))
    config = make(folder, "moved", stop_at_step=3)
    ranks.run(2, folder / "logs", train, config)
    train(make(folder, "moved", stop_at_step=5, resume=True))
    config = replace(make(folder, "moved", resume=True), parallel=FSDP)
    (output, *_) = ranks.run(3, folder / "logs", train, config)
    assert "resumed from" in output
    assert "parallel.strategy (ddp, now fsdp)" in output
    for rows in zip(read_metrics(folder / "straight"), read_metrics(folder / "moved"), strict=True):
        assert_near(*rows)


def test_torchrun_starts_a_run_and_rank_0_speaks_for_it(folder: Path) -> None:
    data = ["--model.path", str(folder / "llama"), "--data.train", str(folder / "pairs.jsonl")]
    how = ["--train.max-steps", "3", "--train.device", "cpu", "--parallel.strategy", "fsdp"]
    run = ["--run.dir", str(folder / "run"), "--loss.beta", "0.2"]
    started = ranks.torchrun(2, folder / "logs", "fastalign", "dpo", *data, *how, *run)
    assert started.join() == [0], started.output(0)
    assert started.output(0).count("dpo 3/3") == 1
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3]
    assert (folder / "run/model/model.safetensors").is_file()


def test_a_mistake_is_said_once(folder: Path) -> None:
    config = sft_config(folder, "run")
    nothing = replace(config, data=replace(config.data, train=str(folder / "none.jsonl")))
    (folder / "mistake.yaml").write_text(as_yaml(config_to_dict(nothing)))
    started = ranks.start(
        2, folder / "logs", ranks.command, "sft", "--config", str(folder / "mistake.yaml")
    )
    assert started.join()[0] == 2
    assert "none.jsonl" in started.output(0).splitlines()[-1]


def assert_same_config(one: Path, other: Path) -> None:
    first, second = (json.loads((path / "config.json").read_text()) for path in (one, other))
    for scale in ("reward_mean", "reward_std", "tie_nu"):  # measured, so rounded
        assert first.pop(scale, 0.0) == pytest.approx(second.pop(scale, 0.0), rel=1e-4)
    assert first == second
