"""Runs with an adapter: products of a frozen head, reference, cache, resuming, what is saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.data.tokenizer import load_tokenizer
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.models.forward import response_logprob
from fastalign.models.load import load_policy, load_reward_model, save_model
from fastalign.models.lora import quiet_peft
from fastalign.runs.accumulate import policy_loss
from fastalign.runs.config import LoraConfig, TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import train_dpo, train_sft
from tests.models.test_exactness import random_groups
from tests.products import recorded
from tests.runs.test_resume import BOTH, assert_same_run
from tests.small_runs import (
    MakeConfig,
    dpo_config,
    prepared_pairs,
    read_metrics,
    saved_tensors,
    sft_config,
)
from tests.tiny import put_adapter, tiny_model
from tests.tokenizers import make_tokenizer

LN_2 = 0.6931471805599453
LORA = LoraConfig(rank=4, alpha=8.0)


def with_lora(config: Any, **lora: Any) -> Any:
    return replace(config, model=replace(config.model, lora=replace(LORA, **lora)))


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


VOCABULARY = 997  # no other size of the models is it: products with it are the head's


@pytest.mark.parametrize(
    ("targets", "products", "low_rank"),
    [(None, 6, 0), (("all-linear",), 4, 0), (("all-linear", "lm_head"), 4, 6)],
    ids=["trained", "frozen", "adapted"],
)
def test_a_frozen_head_costs_two_large_products(
    targets: tuple[str, ...] | None, products: int, low_rank: int
) -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    rank = 3
    if targets is not None:
        put_adapter(model, *targets, rank=rank)
    batch = pack(random_groups())
    compute = make_compute(TrainConfig(device="cpu"))

    def call() -> None:
        loss_fn = sft_loss_fn(normaliser=batch.num_targets)
        policy_loss(model, batch, loss_fn, compute).loss.backward()

    call()
    total = 0
    for event in recorded(call):
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.shapes()[event.name() != "aten::mm" :][:2]
            if VOCABULARY in (*left, *right):
                total += 2 * left[0] * left[1] * right[1]
    rows, width = batch.num_targets, 32
    assert total == products * rows * width * VOCABULARY + low_rank * rows * rank * VOCABULARY


@pytest.mark.parametrize("base", ["float32", "bf16", "nf4"])
def test_the_reference_is_the_base(folder: Path, base: str) -> None:
    precision = {"precision": "bf16"} if base == "bf16" else {}
    config = with_lora(dpo_config(folder, "run", **precision), base=base, targets=("o_proj",))
    assert train_dpo(config).finished
    rows = read_metrics(folder / "run")
    assert abs(rows[0]["loss"] - LN_2) < 1e-6
    assert abs(rows[0]["rewards/margins"]) < 1e-6
    assert rows[-1]["loss"] < LN_2
    assert all(value.dtype == torch.float32 for value in adapter_of(folder / "run").values())


def test_an_adapter_that_has_learned_is_off_in_the_reference(folder: Path) -> None:
    config = dpo_config(folder, "unused")
    tokenizer = load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    compute = make_compute(TrainConfig(device="cpu"))
    found = []
    for number, adapted in enumerate((False, True)):
        model = load_policy(folder / "llama")
        if adapted:
            put_adapter(model, "all-linear", "lm_head")
        cache = replace(config.reference, cache_dir=str(folder / f"cache-{number}"))
        each = replace(config, reference=cache)
        pairs = prepared_pairs(each, model, tokenizer, data, range(12), compute)
        assert pairs.reference is not None
        found.append(pairs.reference)
    assert torch.equal(*found)


def test_the_base_stays_and_the_adapter_learns_the_preference(folder: Path) -> None:
    config = with_lora(dpo_config(folder, "run", max_steps=30))
    train_dpo(replace(config, optim=replace(config.optim, lr=1e-2)))
    rows = read_metrics(folder / "run")
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["eval_rewards/accuracies"] == 1.0
    before = load_file(folder / "llama/model.safetensors")
    after = load_file(folder / "run/model/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_adapters_share_the_reference_log_probs_of_their_base(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_dpo(dpo_config(folder, "full", max_steps=2))
    train_dpo(with_lora(dpo_config(folder, "other", max_steps=2), rank=2, targets=("lm_head",)))
    capsys.readouterr()
    train_dpo(with_lora(dpo_config(folder, "first", max_steps=2, stop_at_step=1)))
    assert "8 cached, 0 to compute" in capsys.readouterr().out
    train_dpo(with_lora(dpo_config(folder, "first", max_steps=2, resume=True)))
    out = capsys.readouterr().out
    assert "8 cached, 0 to compute" in out
    assert "12 cached, 0 to compute" in out  # of data.eval
    train_dpo(with_lora(dpo_config(folder, "rounded", max_steps=2), base="nf4"))
    assert "0 cached, 8 to compute" in capsys.readouterr().out


@BOTH
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_a_stopped_and_resumed_run_equals_a_straight_one(
    folder: Path, make: MakeConfig, train: Any, base: str
) -> None:
    options = {"base": base, "targets": ("all-linear", "lm_head")}
    train(with_lora(make(folder, "straight"), **options))
    train(with_lora(make(folder, "stopped", stop_at_step=3), **options))
    assert not (folder / "stopped" / "adapter").exists()
    train(with_lora(make(folder, "stopped", resume=True), **options))
    assert_same_run(folder / "straight", folder / "stopped")
    first, second = adapter_of(folder / "straight"), adapter_of(folder / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights = saved_tensors(folder / "stopped/checkpoints/step-000008", "model.")
    assert {name.replace(".default", "") for name in weights} == {
        name.removeprefix("base_model.model.") for name in first
    }


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    train_dpo(with_lora(dpo_config(folder, "plain", max_steps=3)))
    train_dpo(with_lora(dpo_config(folder, "again", max_steps=3, gradient_checkpointing=True)))
    first, second = adapter_of(folder / "plain"), adapter_of(folder / "again")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


def test_resuming_on_another_base_or_rank_is_refused(folder: Path) -> None:
    train_sft(with_lora(sft_config(folder, "run", stop_at_step=2)))
    with pytest.raises(ValueError, match=r"settings differ .*: model\.lora\.rank \(4, now 5\)$"):
        train_sft(with_lora(sft_config(folder, "run", resume=True), rank=5))
    save_model(tiny_model("llama", vocab_size=320, seed=1), make_tokenizer(), folder / "llama")
    message = r"the frozen base in model\.path is not what .*step-000002 was trained on"
    with pytest.raises(ValueError, match=message):
        train_sft(with_lora(sft_config(folder, "run", resume=True)))


def test_what_is_written_opens_with_transformers_and_peft(folder: Path) -> None:
    train_sft(with_lora(sft_config(folder, "run"), targets=("all-linear", "lm_head")))
    batch = pack(random_groups())
    ours = response_logprob(load_policy(folder / "run/model"), batch, Compute())
    opened = load_policy(folder / "run/adapter")
    again = response_logprob(opened, batch, Compute())
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    with quiet_peft():
        theirs = PeftModel.from_pretrained(base, folder / "run/adapter")
    torch.testing.assert_close(theirs(ids).logits, opened(ids).logits, rtol=1e-4, atol=1e-4)
    config = sft_config(folder, "more")
    config = replace(config, model=replace(config.model, path=str(folder / "run/adapter")))
    assert train_sft(config).finished  # every weight, from the merged model
    with pytest.raises(ValueError, match=r"lora\.rank: expected 4, as the adapter in .* got 3"):
        train_sft(
            with_lora(replace(config, run=replace(config.run, dir=str(folder / "no"))), rank=3)
        )


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_training_goes_on_with_an_adapter_whose_start_is_the_reference(
    folder: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """First loss log 2, as of the merged model; the reference's log-probs are those, too."""
    targets = ("all-linear", "lm_head")
    config = with_lora(sft_config(folder, "sft", max_steps=20), targets=targets)
    train_sft(replace(config, optim=replace(config.optim, lr=1e-2)))
    start = adapter_of(folder / "sft")

    def goes_on(run: str, **train: Any) -> Any:
        found = dpo_config(folder, run, **train)
        path = str(folder / "sft/adapter")
        return with_lora(replace(found, model=replace(found.model, path=path)), base=base)

    train_dpo(goes_on("straight"))
    rows = read_metrics(folder / "straight")
    assert abs(rows[0]["loss"] - LN_2) < 1e-6
    assert rows[-1]["loss"] < LN_2
    assert "goes on with the adapter" in capsys.readouterr().out
    train_dpo(goes_on("stopped", stop_at_step=3))
    train_dpo(goes_on("stopped", resume=True))
    first, second = adapter_of(folder / "straight"), adapter_of(folder / "stopped")
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)
    if base == "float32":
        whole = dpo_config(folder, "whole", max_steps=1)
        whole = replace(whole, model=replace(whole.model, path=str(folder / "sft/model")))
        train_dpo(whole)
        wanted = read_metrics(folder / "whole")[0]
        for name in ("logps/chosen", "logps/rejected"):
            assert rows[0][name] == pytest.approx(wanted[name], rel=1e-4)
    config = json.loads((folder / "straight/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "llama")
    train_dpo(goes_on("changed", stop_at_step=2))
    file = folder / "sft/adapter/adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    message = "starting model .adapter_model.safetensors.* not what .*step-000002 was trained on"
    with pytest.raises(ValueError, match=message):
        train_dpo(goes_on("changed", resume=True))


def test_the_adapter_of_a_policy_does_not_score(folder: Path) -> None:
    train_sft(with_lora(sft_config(folder, "run", max_steps=1)))
    with pytest.raises(ValueError, match=r"run/adapter is an adapter; merge it first"):
        load_reward_model(folder / "run/adapter")


def test_the_merged_model_may_be_left_out(folder: Path) -> None:
    train_sft(with_lora(sft_config(folder, "run", max_steps=1), save_merged=False))
    assert not (folder / "run/model").exists()
    assert json.loads((folder / "run/adapter/adapter_config.json").read_text())["r"] == 4
    assert (folder / "run/adapter/tokenizer.json").exists()


def test_a_bf16_base_needs_bf16_products(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected --train\.precision bf16 with it, got float32"):
        train_sft(with_lora(sft_config(folder, "run"), base="bf16"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, r"model\.lora\.rank: expected at least 0, got -1"),
        (
            {"rank": 0, "base": "nf4"},
            r"model\.lora\.base: nf4 is a setting of an adapter.* got 0",
        ),
        ({"rank": 0, "alpha": 8.0}, r"model\.lora\.alpha: 8.0 is a setting of an adapter"),
        ({"rank": 4, "alpha": float("nan")}, r"model\.lora\.alpha: expected a finite number above"),
        ({"rank": 4, "targets": ()}, r"model\.lora\.targets: expected at least one name, got none"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
