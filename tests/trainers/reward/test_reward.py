"""The reward model's trainer: a step's loss, gradient and metrics; ties, margins; what is saved."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.forward import hidden_at
from fastalign.models.load import load_reward_model, save_model
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import REWARD_LOSSES, RewardConfig, train_reward
from fastalign.trainers.reward import train as reward
from tests.small_runs import learning_rate_scales, read_metrics, reward_config, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer
from tests.trainers.dpo.step_cases import PACKINGS, gradients

INDICES = [3, 1, 4, 5, 9, 2, 6]


def with_loss(config: RewardConfig, name: str, **parameters: float) -> RewardConfig:
    return replace(config, loss=REWARD_LOSSES[name](**parameters))


def plain_config(folder: Path, run: str, **train: Any) -> RewardConfig:
    """Bradley-Terry on pairs without ties."""
    config = with_loss(reward_config(folder, run, **train), "bradley_terry")
    source = str(folder / "pairs.jsonl")
    return replace(config, data=replace(config.data, train=source, eval=source))


def make_step(
    config: RewardConfig, packing: str = "shared_prefix", tokens: int = 16384
) -> tuple[Any, reward.Comparisons, Compute]:
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model = load_reward_model(config.model.path, compute)
    model.score.weight.data *= 3  # rewards far enough apart for the loss to bend
    data = load_data(config, config.data.train, load_tokenizer(config.model.path))
    reward.add_nu(model, config)
    return model, reward.prepare_comparisons(config.loss, data, compute), compute


def step(config: RewardConfig, *arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    model, pairs, compute = make_step(config, *arguments)
    metrics = reward.reward_gradient(model, config.loss, pairs, INDICES, compute).metrics()
    return metrics, gradients(model)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [1, 40, 90])
@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_step_does_not_depend_on_packing_or_micro_batches(
    folder: Path, packing: str, tokens: int, name: str
) -> None:
    config = reward_config(folder, "unused")
    if name == "bradley_terry":
        config = with_loss(plain_config(folder, "unused"), name, centring_coefficient=0.1)
    else:
        config = with_loss(config, name, nu=1.7, nu_lr=0.1)
    whole_metrics, whole = step(config)
    metrics, parts = step(config, packing, tokens)
    assert metrics.pop("num_micro_batches") >= whole_metrics.pop("num_micro_batches") == 1
    assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-5)
    assert (name == "bradley_terry") == ("log_nu" not in whole)
    for key, value in whole.items():
        size = value.abs().max().item()
        assert size > 0
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=5e-5 * size)


def test_the_gradient_of_bradley_terry_is_the_closed_form(folder: Path) -> None:
    """d loss / d w = - mean of sigmoid(-(r_c - r_r)) (h_c - h_r), of the head r = w h."""
    model, pairs, compute = make_step(plain_config(folder, "unused"))
    batch = pack([pairs.examples.groups[i] for i in INDICES])
    last = batch.response_bounds[:, 1] - 1
    hidden = hidden_at(model, batch, last, Compute()).detach()
    rewards = (hidden @ model.score.weight[0]).detach()
    difference = rewards[0::2] - rewards[1::2]
    away = torch.sigmoid(-difference)[:, None] * (hidden[0::2] - hidden[1::2])
    metrics = reward.reward_gradient(
        model, REWARD_LOSSES["bradley_terry"](), pairs, INDICES, compute
    ).metrics()
    torch.testing.assert_close(model.score.weight.grad, -away.mean(0, keepdim=True))
    assert metrics["loss"] == pytest.approx(torch.log1p((-difference).exp()).mean().item())
    assert metrics["accuracy"] == pytest.approx((difference > 0).float().mean().item())
    assert 0 < metrics["accuracy"] < 1
    assert metrics["margin"] == pytest.approx(difference.mean().item(), rel=1e-5)
    for name in ("min", "mean", "max"):
        found = getattr(rewards, name)().item()
        assert metrics[f"{name}_reward"] == pytest.approx(found, rel=1e-5, abs=1e-6)
    assert (metrics["num_pairs"], metrics["num_ties"]) == (7, 0)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_shift_of_all_rewards_changes_nothing_but_the_rewards(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_loss(reward_config(folder, "unused"), name)
    if name == "bradley_terry":
        config = plain_config(folder, "unused")
    before, gradient = step(config)
    plain = reward.response_reward
    monkeypatch.setattr(reward, "response_reward", lambda *a, **k: plain(*a, **k) + 3.0)
    after, shifted = step(config)
    for key in ("loss", "accuracy", "margin"):
        assert after[key] == pytest.approx(before[key], rel=1e-5)
    for key in ("min_reward", "mean_reward", "max_reward"):
        assert after[key] == pytest.approx(before[key] + 3.0, rel=1e-5)
    for key, value in gradient.items():
        size = value.abs().max().item()
        torch.testing.assert_close(shifted[key], value, rtol=1e-4, atol=1e-5 * size)


def test_ties_count_in_the_loss_and_not_in_the_accuracy(folder: Path) -> None:
    config = with_loss(reward_config(folder, "unused"), "rao_kupper", nu=3.0)
    model, pairs, compute = make_step(config)
    metrics = reward.reward_gradient(model, config.loss, pairs, [3, 7, 11], compute).metrics()
    assert (metrics["num_pairs"], metrics["num_ties"]) == (3, 3)
    assert (metrics["accuracy"], metrics["margin"]) == (0, 0)
    batch = pack([pairs.examples.groups[i] for i in [3, 7, 11]])
    found = reward.response_reward(model, batch, Compute()).double().tolist()
    expected = 0.0
    for first, second in zip(found[0::2], found[1::2], strict=True):
        d, sigmoid = first - second, lambda x: 1 / (1 + math.exp(-x))
        expected -= math.log(8 * sigmoid(d - math.log(3)) * sigmoid(-d - math.log(3))) / 3
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_rows_margin_is_used_by_bradley_terry_and_named_by_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    without, _ = step(plain_config(folder, "unused"))
    rows[3]["margin"] = 2.0
    write_rows(folder / "pairs.jsonl", rows)
    config = plain_config(folder, "unused")
    with_margin, _ = step(config)
    model, pairs, _ = make_step(config)
    assert pairs.labels.margin.tolist() == [0, 0, 0, 2.0, *[0] * 8]
    batch = pack([pairs.examples.groups[3]])
    chosen, rejected = reward.response_reward(model, batch, Compute()).tolist()
    rise = math.log1p(math.exp(2 - chosen + rejected)) - math.log1p(math.exp(rejected - chosen))
    assert with_margin["loss"] - without["loss"] == pytest.approx(rise / 7, rel=1e-4)
    capsys.readouterr()
    step(with_loss(config, "davidson"))
    assert "margins of 1 rows are not used by this loss" in capsys.readouterr().out


def test_ties_need_a_loss_with_ties_or_are_dropped(folder: Path) -> None:
    config = with_loss(reward_config(folder, "refused"), "bradley_terry")
    with pytest.raises(ValueError, match=r"compared\.jsonl:4: .*a tie, .*rao_kupper or davidson"):
        train_reward(config)
    dropping = replace(config, run=replace(config.run, dir=str(folder / "run")))
    train_reward(replace(dropping, data=replace(config.data, ties="drop")))
    assert read_metrics(folder / "run")[-1]["eval_num_pairs"] == 9


def test_nu_is_learned_at_its_own_rate_and_written_in_the_configuration(folder: Path) -> None:
    train_reward(reward_config(folder, "run"))
    rows = read_metrics(folder / "run")
    steps = [math.log(row["nu"] - 1) for row in rows]
    # Adam's first step has the size of the learning rate: half of 0.05 in the warm-up, not of 1e-3.
    assert abs(steps[1] - steps[0]) == pytest.approx(0.025, rel=0.01)
    config = json.loads((folder / "run/model/config.json").read_text())
    assert config["tie_model"] == "rao_kupper"
    weights = load_file(folder / "run/model/model.safetensors")
    assert set(weights) == set(load_reward_model(folder / "run/model").state_dict())
    scales = learning_rate_scales(folder / "run/checkpoints/step-000008")
    assert scales == pytest.approx([1.0, 50.0])
    assert config["tie_nu"] != pytest.approx(rows[-1]["nu"], rel=1e-6)  # a step after it
    assert config["tie_nu"] == pytest.approx(rows[-1]["nu"], rel=0.05)
    zero = reward_config(folder, "zero")
    with pytest.raises(ValueError, match=r"optim\.lr: expected more than 0"):
        train_reward(replace(zero, optim=replace(zero.optim, lr=0.0)))


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_it_learns_and_the_saved_model_gives_the_trainers_scores(
    folder: Path, pad_is_eos: bool
) -> None:
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder / "llama")
    train_reward(plain_config(folder, "run", max_steps=30))
    last = read_metrics(folder / "run")[-1]
    assert last["eval_loss"] < 0.3
    assert last["eval_accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run/model")
    saved = AutoTokenizer.from_pretrained(folder / "run/model")
    assert saved.pad_token_id != saved.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == 320 + pad_is_eos
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    texts = [row["prompt"] + row[side] + "</s>" for row in rows for side in ("chosen", "rejected")]
    with torch.no_grad():
        batch = saved(texts, padding=True, return_tensors="pt")
        rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert last["eval_mean_reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert last["eval_min_reward"] == pytest.approx(rewards.min().item(), rel=1e-4)
    assert last["eval_max_reward"] == pytest.approx(rewards.max().item(), rel=1e-4)
    margin = (rewards[0::2] - rewards[1::2]).mean().item()
    assert last["eval_margin"] == pytest.approx(margin, rel=1e-4)

    again = plain_config(folder, "again", max_steps=1)
    again = replace(again, model=replace(again.model, path=str(folder / "run/model")))
    train_reward(again)
    assert read_metrics(folder / "again")[0]["loss"] < 0.3, "the head was kept"


@pytest.mark.parametrize("name", ["shared_prefix", "padded"])
def test_gradient_checkpointing_and_bf16_run(folder: Path, name: Any) -> None:
    exact = train_reward(plain_config(folder, "exact", max_steps=1, packing=name))
    low = train_reward(
        plain_config(
            folder, "low", max_steps=1, packing=name, precision="bf16", gradient_checkpointing=True
        )
    )
    assert low.metrics[-1]["loss"] == pytest.approx(exact.metrics[-1]["loss"], rel=0.05)
    assert low.metrics[-1]["loss"] != exact.metrics[-1]["loss"]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rao_kupper", {"nu": 1.0}, r"loss\.nu: expected a finite number above 1, got 1\.0"),
        ("davidson", {"nu": 0.0}, r"loss\.nu: expected a finite number above 0, got 0\.0"),
        ("davidson", {"nu_lr": -1.0}, r"loss\.nu_lr: expected a finite number of at least 0"),
        ("bradley_terry", {"centring_coefficient": -1.0}, r"loss\.centring_coefficient"),
    ],
)
def test_a_parameter_out_of_range_is_refused(
    name: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        REWARD_LOSSES[name](**parameters)
