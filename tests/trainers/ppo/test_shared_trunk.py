"""Values from the policy's own layers: gradients, forwards, what is written, resuming."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.models.load import load_policy, load_reward_model
from fastalign.models.reward import VALUE_HEAD, score_at
from fastalign.rollouts.engines.weights import policy_tensors
from fastalign.runs.config import LoraConfig
from fastalign.trainers import Rloo, ValueConfig, train_ppo
from fastalign.trainers.ppo.record import NOTHING_WAITS, FirstUpdate, first_update_can_compute
from fastalign.trainers.ppo.train import all_updates
from tests.runs.test_resume import assert_same_run
from tests.small_runs import learning_rate_scales, ppo_config, read_metrics, saved_tensors
from tests.trainers.dpo.step_cases import PACKINGS, gradients
from tests.trainers.ppo.ppo_cases import (
    eager_loss,
    experience_of,
    make_run,
    plain_config,
    rollouts_of,
    state_of,
)
from tests.trainers.ppo.test_ppo import FORMS, first_gradient

LORA = LoraConfig(rank=4, alpha=8.0)


def shared_config(folder: Path, share: float = 1.0, **sections: Any) -> Any:
    config = plain_config(folder, **sections)
    return replace(config, value=replace(config.value, share_policy=True, trunk_gradient=share))


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("form", ["k1", "full-loss"])
def test_the_first_updates_gradient_is_that_of_plain_torch(
    folder: Path, form: str, share: float
) -> None:
    run = make_run(shared_config(folder, share, **FORMS[form]))
    rollouts = rollouts_of(run)
    loss, found = first_gradient(run, rollouts)
    expected = eager_loss(run, rollouts, rollouts.rewards.tolist())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    eager = gradients(run.models.trained)
    assert found.keys() == eager.keys()
    assert [name for name in found if "value" in name] == [f"policy.{VALUE_HEAD}.weight"]
    for name, value in eager.items():
        size = value.abs().max().item()
        assert size > 0
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_does_not_depend_on_packing_or_micro_batches(folder: Path, packing: str) -> None:
    config = shared_config(folder, 0.5, **FORMS["k1"])
    whole = make_run(config)
    rollouts = rollouts_of(whole)
    loss, gradient = first_gradient(whole, rollouts)
    parts_loss, parts = first_gradient(
        make_run(config, packing=packing, tokens_per_batch=60), rollouts
    )
    assert parts_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
    for name, value in gradient.items():
        size = value.abs().max().item()
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4 * size)


def test_policy_and_values_have_one_forward_together(folder: Path) -> None:
    run = make_run(shared_config(folder, ppo={"epochs": 3}))
    rollouts = rollouts_of(run)
    calls = {"policy": 0, "reference": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        getattr(run.models, name).model.register_forward_hook(count(name))
    assert first_update_can_compute(run.config) == NOTHING_WAITS
    experience, _ = experience_of(run, rollouts)
    assert calls == {"policy": 1, "reference": 1}
    updates = all_updates(run, experience, state_of(run), 8)
    assert calls == {"policy": 4, "reference": 1}
    losses = [metrics["loss/value_avg"] for metrics in updates]
    assert losses == sorted(losses, reverse=True)
    assert not isinstance(experience.first_value, FirstUpdate)
    assert updates[0]["val/clipfrac_avg"] == 0
    for metrics in updates:  # the whole loss is its terms
        parts = metrics["loss/policy_avg"] + 0.1 * metrics["loss/value_avg"]
        assert metrics["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_written_and_a_resumed_run(folder: Path, adapted: bool) -> None:
    def config(run: str, **train: Any) -> Any:
        found = ppo_config(folder, run, **train)
        value = ValueConfig(share_policy=True, trunk_gradient=0.5, lr=5e-3)
        lora = LORA if adapted else LoraConfig()
        return replace(found, value=value, model=replace(found.model, lora=lora))

    own = folder / "llama/config.json"
    values = json.loads(own.read_text())
    own.write_text(json.dumps(values | {"pad_token_id": values["eos_token_id"]}))
    train_ppo(config("straight"))
    train_ppo(config("stopped", stop_at_step=3))
    train_ppo(config("stopped", resume=True))
    rows = [read_metrics(folder / run) for run in ("straight", "stopped")]
    assert [row["loss/value_avg"] for row in rows[0]] == [row["loss/value_avg"] for row in rows[1]]
    if not adapted:
        assert_same_run(folder / "straight", folder / "stopped")
    file = f"{'adapter_' if adapted else ''}model.safetensors"
    saved = [load_file(folder / run / "value" / file) for run in ("straight", "stopped")]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    checkpoint = folder / "straight/checkpoints/step-000008"
    assert learning_rate_scales(checkpoint) == pytest.approx([1.0, 5.0])
    # the written policy is a policy, and the written value model has its layers
    written = load_file(folder / "straight/model/model.safetensors")
    assert written.keys() == load_file(folder / "llama/model.safetensors").keys()
    AutoModelForCausalLM.from_pretrained(folder / "straight/model")
    value = load_reward_model(folder / "straight/value", fresh_head=False)
    name = "reward_config.json" if adapted else "config.json"
    pad = json.loads((folder / "straight/value" / name).read_text())["pad_token_id"]
    # not the base's pad token, which ends answers: then the token before it would be read
    assert value.config.pad_token_id == pad != values["eos_token_id"]
    layers = value.state_dict()
    assert layers["score.weight"].abs().max() > 0
    for name, weight in layers.items():
        if name != "score.weight":
            torch.testing.assert_close(weight, written[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_best_evaluations_policy_and_values_are_written(folder: Path, adapted: bool) -> None:
    """The KL grows with each step, so that the first evaluation is the best, and not the last."""
    best = {"eval_every": 2, "keep_checkpoints": 1, "best_metric": "eval_objective/kl"}
    config = ppo_config(folder, "run", **best)
    lora = LORA if adapted else LoraConfig()
    config = replace(
        config,
        value=ValueConfig(share_policy=True),
        model=replace(config.model, lora=lora),
        optim=replace(config.optim, lr=1e-2),
    )
    result = train_ppo(config)
    assert result.best is not None
    assert result.best.step < result.step
    assert not hasattr(result.model, VALUE_HEAD)
    kept, last = (
        saved_tensors(folder / f"run/checkpoints/step-{step:06d}", "model.")
        for step in (result.best.step, result.step)
    )
    file = f"{'adapter_' if adapted else ''}model.safetensors"
    of_policy, of_value = (
        load_file(folder / "run" / part / file)
        for part in ("adapter" if adapted else "model", "value")
    )
    score = of_value.pop(f"{'base_model.model.' if adapted else ''}score.weight")
    head = f"policy.{VALUE_HEAD}.weight"
    assert torch.equal(score, kept[head])
    assert not torch.equal(score, last[head])
    for name, value in of_policy.items():
        assert name not in of_value or torch.equal(of_value[name], value)
        held = f"policy.{name.removeprefix('base_model.model.')}"
        held = held.replace(".weight", ".default.weight") if adapted else held
        assert torch.equal(value, kept[held])
        assert not torch.equal(value, last[held])


def test_the_written_value_model_gives_the_runs_values(folder: Path) -> None:
    config = shared_config(folder, 0.5)
    train_ppo(config)
    run = make_run(config, moved=False)
    policy = load_policy(folder / "run/model")
    value = load_reward_model(folder / "run/value", fresh_head=False)
    run.models.policy.load_state_dict(policy.state_dict(), strict=False)
    head = getattr(run.models.policy, VALUE_HEAD)
    head.weight.data.copy_(value.score.weight)
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    batch = pack(rollouts.groups)
    expected = score_at(value, batch, batch.predict_index, Compute()).detach()
    assert experience.record.value is not None
    assert expected.abs().max() > 0
    torch.testing.assert_close(experience.record.value, expected, rtol=1e-4, atol=1e-5)


def test_an_engine_gets_the_policys_own_tensors(folder: Path) -> None:
    run = make_run(shared_config(folder))
    plain = load_policy(folder / "llama")
    assert {name for name, _ in policy_tensors(run.models.policy)} == plain.state_dict().keys()


def test_settings_that_do_not_go_together_are_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"value\.path: x is a setting of a value model of its own"
    ):
        ValueConfig(share_policy=True, path="x")
    with pytest.raises(ValueError, match=r"value\.lora_rank: 4 is a setting of a value model of"):
        ValueConfig(share_policy=True, lora_rank=4)
    with pytest.raises(ValueError, match=r"trunk_gradient: 0\.5 is a setting of value\.share_poli"):
        ValueConfig(trunk_gradient=0.5)
    with pytest.raises(ValueError, match=r"value\.trunk_gradient: expected .* at most 1, got 1\.5"):
        ValueConfig(share_policy=True, trunk_gradient=1.5)
    with pytest.raises(ValueError, match=r"value\.share_policy: a setting of a value model"):
        shared_config(folder, ppo={"advantage": Rloo()}, sampling={"num_samples": 2})
