"""PPO on one frozen base: the numbers of separately loaded models, what is held and written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastalign.batch.packed import pack
from fastalign.data.tokenizer import load_tokenizer
from fastalign.evaluation.rewards import ModelReward
from fastalign.models.load import load_reward_model
from fastalign.models.lora import adapter_parts
from fastalign.models.lora_files import save_adapter
from fastalign.models.reward import score_at
from fastalign.rollouts.engines.weights import policy_tensors
from fastalign.runs.config import LoraConfig
from fastalign.trainers import PPOConfig, Rloo, train_ppo
from fastalign.trainers.ppo.setup import PPOSetup, save_value
from fastalign.trainers.ppo.train import update_gradient
from tests.small_runs import WORDS, ppo_config, read_metrics, saved_tensors
from tests.tiny import put_adapter, tiny_reward_model
from tests.trainers.ppo.ppo_cases import (
    experience_of,
    make_run,
    plain_config,
    rollouts_of,
    state_of,
)

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def adapter(folder: Path) -> str:
    """A reward model's adapter on the policy's base, with a scale of its scores."""
    model = put_adapter(load_reward_model(folder / "llama"))
    model.config.reward_mean, model.config.reward_std = 0.3, 1.7
    save_adapter(model, folder / "rm")
    load_tokenizer(folder / "llama").save_pretrained(folder / "rm")
    return str(folder / "rm")


def on_one_base(config: PPOConfig, *sources: str, lora: LoraConfig = LORA) -> PPOConfig:
    reward = replace(config.reward, sources=(*config.reward.sources, *sources))
    ppo = replace(config.ppo, one_base=True)
    return replace(config, model=replace(config.model, lora=lora), ppo=ppo, reward=reward)


def set_policy(run: PPOSetup) -> None:
    """An adapter that changes the policy, the same in every run."""
    generator = torch.Generator().manual_seed(3)
    for part in adapter_parts(run.models.policy, "default"):
        part.weight.data = 0.1 * torch.randn(part.weight.shape, generator=generator)


def numbers(config: PPOConfig, rollouts: Any = None, **train: Any) -> tuple[Any, Any, list[Tensor]]:
    """(the rollouts, the record, the gradients: policy's, value's) of a step."""
    run = make_run(config, moved=False, **train)
    set_policy(run)
    rollouts = rollouts_of(run) if rollouts is None else rollouts
    experience, _ = experience_of(run, rollouts)
    update_gradient(run, experience, range(len(rollouts.groups)), 0)
    value = run.models.value
    of_value = list(value.parameters())
    if hasattr(value, "peft_config"):
        of_value = [each.weight for each in (*adapter_parts(value, "default"), value.score)]
    of_policy = [each.weight for each in adapter_parts(run.models.policy, "default")]
    return rollouts, experience.record, [p.grad for p in (*of_policy, *of_value)]


@pytest.mark.parametrize(
    ("base", "train"),
    [
        ("float32", {}),
        ("float32", {"gradient_checkpointing": True, "tokens_per_batch": 80}),
        ("float32", {"packing": "padded"}),
        ("nf4", {}),
        ("bf16", {"precision": "bf16"}),
    ],
    ids=["float32", "checkpointed", "padded", "nf4", "bf16"],
)
def test_numbers_and_gradients_are_those_of_separately_loaded_models(
    folder: Path, adapter: str, base: Any, train: dict[str, Any]
) -> None:
    together = on_one_base(plain_config(folder), adapter, lora=replace(LORA, base=base))
    apart = replace(together, ppo=replace(together.ppo, one_base=False))
    rollouts, record, gradient = numbers(together, **train)
    _, expected, wanted = numbers(apart, rollouts, **train)
    near = {"rtol": 1e-4, "atol": 1e-5} if base != "bf16" else {"rtol": 2e-2, "atol": 2e-2}
    for name in ("logprob", "reference_logprob", "entropy", "value"):
        torch.testing.assert_close(getattr(record, name), getattr(expected, name), **near)
    assert (record.logprob - record.reference_logprob).abs().max() > 1e-2
    assert record.value.abs().max() > 0.05
    assert len(gradient) == len(wanted)
    for ours, theirs in zip(gradient, wanted, strict=True):
        size = float(theirs.abs().max())
        assert size > 0
        slack = 1e-3 if base != "bf16" else 0.1
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * size)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_rewards_are_those_of_the_adapter_on_a_base_of_its_own(
    folder: Path, adapter: str, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(on_one_base(plain_config(folder), adapter, lora=replace(LORA, base=base)))
    other_format = "was trained on a base in float32, and model.lora.base is nf4: its numbers"
    assert (other_format in capsys.readouterr().out) == (base == "nf4")
    before = [name for name, p in run.models.policy.named_parameters() if p.requires_grad]
    alone: Any = load_reward_model(adapter, keep_adapter=True, nf4=base == "nf4")
    prompts, answers = [f"The {word}" for word in WORDS], [f" is {word}" for word in WORDS]
    expected = ModelReward(adapter, run.compute, model=alone)(prompts, answers)
    rollouts_of(run)
    found = run.sources.functions[1](prompts, answers)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert max(found) - min(found) > 0.1
    raw = ModelReward(adapter, run.compute, raw=True, model=run.models.rewards[adapter])
    assert found == pytest.approx([(x - 0.3) / 1.7 for x in raw(prompts, answers)], abs=1e-5)
    after = [name for name, p in run.models.policy.named_parameters() if p.requires_grad]
    assert before == after  # scoring, sampling and the reference leave what is trained as it is
    assert {name.split(".")[-2] for name in after} == {"default", "fastalign_value"}


def test_the_base_is_held_once(folder: Path, adapter: str) -> None:
    run = make_run(on_one_base(plain_config(folder), adapter))
    models, reward = run.models, run.models.rewards[adapter]
    assert models.reference is models.policy
    assert models.value.base_model is reward.base_model is models.policy.model
    state = state_of(run)
    trained = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in state.model.parameters() if p.requires_grad}
    assert not trained & {id(p) for p in reward.parameters()}
    of_policy, of_value = ({id(p) for p in each} for each in state.model.clipped_apart)
    assert of_value == {id(p) for p in models.value.parameters()}
    assert not of_policy & of_value
    assert reward.config.reward_mean == 0.3
    assert not hasattr(models.policy.config, "reward_mean")  # each has a configuration of its own
    held = sum(p.numel() for p in state.model.parameters())
    base = sum(value.numel() for value in load_file(folder / "llama/model.safetensors").values())
    small = sum(p.numel() for m in (models.value, reward) for p in m.adapter.parameters())
    own = sum(each.weight.numel() for each in adapter_parts(models.policy, "default"))
    assert held == base + small + own + models.value.score.weight.numel()
    names = {name for name, _ in policy_tensors(models.policy)}
    assert names == load_file(folder / "llama/model.safetensors").keys()


def test_the_value_model_begins_as_the_reward_model(folder: Path, adapter: str) -> None:
    run = make_run(on_one_base(plain_config(folder), adapter), moved=False)
    reward = run.models.rewards[adapter]
    for ours, theirs in zip(run.models.value.parameters(), reward.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    # and its values are on the scale of the rewards
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    batch = pack(rollouts.groups)
    raw = score_at(run.models.value, batch, batch.predict_index, run.compute).detach()
    torch.testing.assert_close(experience.record.value, (raw - 0.3) / 1.7, rtol=1e-4, atol=1e-5)


def test_a_value_model_without_a_beginning_is_a_new_adapter_under_a_head_of_zeros(
    folder: Path,
) -> None:
    lora = replace(LORA, targets=("all-linear", "lm_head"))
    fresh = make_run(on_one_base(plain_config(folder), lora=lora), moved=False)
    value, policy = fresh.models.value, fresh.models.policy
    assert value.score.weight.abs().max() == 0
    experience, _ = experience_of(fresh, rollouts_of(fresh))
    assert experience.record.value is not None
    assert experience.record.value.abs().max() == 0
    # on the policy's layers but its vocabulary head, which no classifier has
    own = [
        {name: part for name, part in policy.named_modules() if name.endswith(f"lora_A.{each}")}
        for each in ("default", "fastalign_value")
    ]
    layers = [{name.partition(".lora_A")[0] for name in found} for found in own]
    assert layers[0] - layers[1] == {"lm_head"}
    assert layers[1] < layers[0]
    save_value(fresh.models, folder / "value")
    written = load_reward_model(folder / "value", fresh_head=False)
    assert written.score.weight.abs().max() == 0


def test_values_have_a_learning_rate_of_their_own(folder: Path, adapter: str) -> None:
    config = on_one_base(plain_config(folder, value={"lr": 5e-3}), adapter)
    models = make_run(config, moved=False).models
    (scale,) = {getattr(p, "lr_scale", 1.0) for p in models.value.parameters()}
    assert scale == pytest.approx(5e-3 / config.optim.lr)
    of_policy = [each.weight for each in adapter_parts(models.policy, "default")]
    assert {getattr(p, "lr_scale", 1.0) for p in of_policy} == {1.0}


def test_the_best_evaluations_adapters_are_written(folder: Path, adapter: str) -> None:
    """The KL grows with each step, so that the first evaluation is the best, and not the last."""
    best = {"eval_every": 2, "keep_checkpoints": 1, "best_metric": "eval_objective/kl"}
    config = on_one_base(ppo_config(folder, "run", **best), adapter)
    config = replace(config, optim=replace(config.optim, lr=1e-2))
    result = train_ppo(config)
    assert result.best is not None
    assert result.best.step < result.step
    exported = replace(config, run=replace(config.run, export=str(folder / "out"), resume=True))
    train_ppo(exported)
    kept, last = (
        saved_tensors(folder / f"run/checkpoints/step-{step:06d}", "model.")
        for step in (result.best.step, result.step)
    )
    for part, name in (("adapter", "default"), ("value", "fastalign_value")):
        for where in ("run", "out"):
            written = load_file(folder / where / part / "adapter_model.safetensors")
            for of_file, value in written.items():
                own = of_file.removeprefix("base_model.model.")
                held = f"policy.{own.replace('.weight', f'.{name}.weight')}"
                held = held if held in kept else "value.score.weight"
                assert torch.equal(value, kept[held])
                assert not torch.equal(value, last[held])


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_what_is_written_and_a_resumed_run(folder: Path, adapter: str, base: Any) -> None:
    def config(run: str, **train: Any) -> PPOConfig:
        lora = replace(LORA, base=base, targets=("all-linear", "lm_head"))
        return on_one_base(ppo_config(folder, run, **train), adapter, lora=lora)

    train_ppo(config("straight"))
    train_ppo(config("stopped", stop_at_step=3))
    train_ppo(config("stopped", resume=True))
    rows = [read_metrics(folder / run) for run in ("straight", "stopped")]
    names = ("loss", "objective/kl", "rewards/rm/mean", "val/mean")
    for row, again in zip(*rows, strict=True):
        assert [row[name] for name in names] == [again[name] for name in names]
    assert rows[0][0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    for part in ("adapter", "value"):
        first, second = (
            load_file(folder / run / part / "adapter_model.safetensors")
            for run in ("straight", "stopped")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = load_file(f"{adapter}/adapter_model.safetensors")
    value = load_file(folder / "straight/value/adapter_model.safetensors")
    assert value.keys() == start.keys()
    assert all(not torch.equal(value[name], start[name]) for name in start)
    load_reward_model(folder / "straight/value", fresh_head=False)
    if base == "float32":
        before = load_file(folder / "llama/model.safetensors")
        merged = load_file(folder / "straight/model/model.safetensors")
        assert before.keys() == merged.keys()
        changed = {name for name in before if not torch.equal(before[name], merged[name])}
        assert changed == {n for n in before if n.endswith(("_proj.weight", "lm_head.weight"))}


def test_a_changed_reward_or_value_adapter_ends_a_resume(folder: Path, adapter: str) -> None:
    train_ppo(on_one_base(ppo_config(folder, "run", stop_at_step=2), adapter))
    model = load_reward_model(adapter, keep_adapter=True)
    model.score.weight.data.mul_(2)
    save_adapter(model, adapter)
    message = r"the (reward|starting value model) .*, the .* are not what .*step-000002 was trained"
    with pytest.raises(ValueError, match=message):
        train_ppo(on_one_base(ppo_config(folder, "run", resume=True), adapter))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_value_model_may_be_an_adapter_of_its_own(folder: Path, adapter: str, rank: int) -> None:
    """Of the policy's rank or another one, beside a policy that is trained whole."""
    config = plain_config(folder, value={"path": None if rank else adapter, "lora_rank": rank})
    run = make_run(config, moved=False)
    trained = {n for n, p in run.models.value.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"})
    assert {len(part.weight) for part in adapter_parts(run.models.value, "default")[::2]} == {3}
    config = replace(config, train=replace(config.train, max_steps=2))
    train_ppo(config)
    saved = load_file(folder / "run/value/adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].abs().max() > 0
    load_reward_model(folder / "run/value", fresh_head=False)
    again = replace(config, run=replace(config.run, dir=str(folder / "more")))
    train_ppo(
        replace(again, value=replace(again.value, path=str(folder / "run/value"), lora_rank=0))
    )


def test_what_cannot_share_the_base_is_named(folder: Path, adapter: str) -> None:
    plain = plain_config(folder)
    with pytest.raises(ValueError, match=r"model\.lora\.rank: expected more than 0 with ppo\.one"):
        replace(plain, ppo=replace(plain.ppo, one_base=True))
    config = on_one_base(plain, adapter)
    with pytest.raises(ValueError, match=r"reference\.path: expected none with ppo\.one_base"):
        replace(config, reference=replace(config.reference, path="x"))
    with pytest.raises(ValueError, match=r"parallel\.strategy: expected ddp with ppo\.one_base"):
        replace(config, parallel=replace(config.parallel, strategy="fsdp"))
    whole = tiny_reward_model("llama", vocab_size=320)
    whole.save_pretrained(folder / "whole")
    load_tokenizer(folder / "llama").save_pretrained(folder / "whole")
    with pytest.raises(
        ValueError, match=r"reward\.sources: expected a reward model's adapter with"
    ):
        make_run(on_one_base(plain, str(folder / "whole")))
    other = put_adapter(load_reward_model(folder / "whole"))
    save_adapter(other, folder / "other")
    load_tokenizer(folder / "llama").save_pretrained(folder / "other")
    message = r"reward\.sources: expected an adapter on the policy's base .*other is on .*whole$"
    with pytest.raises(ValueError, match=message):
        make_run(on_one_base(plain, str(folder / "other")))
    value = replace(config.value, path=str(folder / "other"))
    with pytest.raises(ValueError, match=r"value\.path: expected an adapter on the policy"):
        make_run(replace(config, value=value))


def test_without_a_critic_rewards_are_on_the_base(folder: Path, adapter: str) -> None:
    sections = {"ppo": {"advantage": Rloo()}, "sampling": {"num_samples": 2}}
    config = on_one_base(plain_config(folder, **sections), adapter)
    assert train_ppo(replace(config, train=replace(config.train, max_steps=2))).finished
    assert not (folder / "run/value").exists()
