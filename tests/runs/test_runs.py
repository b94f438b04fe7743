"""What a run does: precision, non-finite steps, the cache, evaluation, refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.models.layers import compile_layers
from fastalign.models.load import save_model
from fastalign.runs import inputs, loop
from fastalign.runs.config import OptimConfig, TrackConfig, TrainConfig
from fastalign.runs.open import make_compute
from fastalign.runs.state import learning_rate
from fastalign.trainers import LOSSES, train_dpo, train_ppo, train_sft
from tests.small_runs import (
    MakeConfig,
    dpo_config,
    ppo_config,
    read_metrics,
    saved_tensors,
    sft_config,
    write_rows,
)
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    train_dpo(dpo_config(folder, "plain", max_steps=3))
    train_dpo(dpo_config(folder, "checkpointed", max_steps=3, gradient_checkpointing=True))
    first, second = (
        load_file(folder / run / "model/model.safetensors") for run in ("plain", "checkpointed")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_change_nothing_and_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "compile_layers", partial(compile_layers, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    for run, stop in (("plain", None), ("compiled", None), ("stopped", 1)):
        compiled = run != "plain"
        config = sft_config(folder, run, max_steps=3, compile=compiled, stop_at_step=stop)
        config = replace(config, data=replace(config.data, eval=None))
        train_sft(config)
        assert bool(counters["stats"]["unique_graphs"]) is compiled
    resumed_run, whole = replace(config.run, resume=True), replace(config.train, stop_at_step=None)
    train_sft(replace(config, run=resumed_run, train=whole))
    plain, ours, resumed = (
        load_file(folder / run / "model/model.safetensors")
        for run in ("plain", "compiled", "stopped")
    )
    assert plain.keys() == ours.keys() == resumed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[name], resumed[name])


def test_bf16_trains_with_float32_weights(folder: Path) -> None:
    train_dpo(dpo_config(folder, "bf16", precision="bf16", max_steps=3))
    rows = read_metrics(folder / "bf16")
    assert abs(rows[0]["loss"] - 0.6931471805599453) < 1e-6
    weights = load_file(folder / "bf16/model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastalign.trainers.dpo.train as module

    plain = module.dpo_gradient
    calls = []

    def poisoned(model: Any, *arguments: Any) -> Any:
        total = plain(model, *arguments)
        calls.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(calls) == 3:
            if where == "loss":
                total.loss = float("nan")
            else:
                next(model.parameters()).grad[5, 3] = float("inf")
        return total

    monkeypatch.setattr(module, "dpo_gradient", poisoned)
    train_dpo(dpo_config(folder, "run"))
    rows = read_metrics(folder / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert all(torch.equal(calls[2][name], calls[3][name]) for name in calls[2])
    assert not all(torch.equal(calls[3][name], calls[4][name]) for name in calls[3])


def test_three_such_steps_in_a_row_end_the_run_without_a_bad_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastalign.trainers.sft as module

    plain = module.sft_gradient

    def poisoned(*arguments: Any) -> Any:
        total = plain(*arguments)
        total.loss = float("nan")
        return total

    monkeypatch.setattr(module, "sft_gradient", poisoned)
    with pytest.raises(ValueError, match="3 steps in a row had a non-finite loss"):
        train_sft(sft_config(folder, "run", save_every=1))
    rows = read_metrics(folder / "run")
    assert [row["skipped"] for row in rows] == [1, 1, 1]
    assert {row["loss"] for row in rows} == {"nan"}
    before = load_file(folder / "llama/model.safetensors")
    after = saved_tensors(folder / "run/checkpoints/step-000003", "model.")
    assert after
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_losses_without_a_reference_compute_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_dpo(replace(dpo_config(folder, "run", max_steps=1), loss=LOSSES["simpo"]()))
    assert "reference log-probs" not in capsys.readouterr().out
    assert not (folder / "reference").exists()


def test_ties_are_used_by_the_losses_that_have_a_place_for_them(folder: Path) -> None:
    rows = [
        {"prompt": "The", "response_a": " menu", "response_b": " screen", "label": label}
        for label in ("a", "tie", "b", "tie")
    ]
    write_rows(folder / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match="a tie, which this loss does not support"):
        train_dpo(dpo_config(folder, "refused"))
    for name in ("dpo_rao_kupper", "dpo_davidson"):
        train_dpo(replace(dpo_config(folder, name, max_steps=1), loss=LOSSES[name]()))
        assert read_metrics(folder / name)[0]["num_ties"] == 2


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(folder: Path, name: str) -> None:
    result = train_dpo(replace(dpo_config(folder, name, max_steps=2), loss=LOSSES[name]()))
    assert result.finished
    assert all(row["grad_norm"] > 0 for row in read_metrics(folder / name))


def test_the_final_model_opens_with_transformers_and_learned_the_preference(folder: Path) -> None:
    train_dpo(dpo_config(folder, "run", max_steps=30))
    rows = read_metrics(folder / "run")
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["eval_rewards/accuracies"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(folder / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/model")
    assert (
        tokenizer("The")["input_ids"]
        == AutoTokenizer.from_pretrained(folder / "llama")("The")["input_ids"]
    )
    trained = saved_tensors(folder / "run/checkpoints/step-000030", "model.")
    for name, value in model.named_parameters():
        assert torch.equal(value, trained[name])


def test_evaluation_is_logged_when_it_is_due(folder: Path) -> None:
    config = replace(sft_config(folder, "run", eval_every=3), track=TrackConfig(("tensorboard",)))
    train_sft(config)
    rows = read_metrics(folder / "run")
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 8]
    names = {"loss", "epoch", "num_tokens", "learning_rate", "grad_norm", "mean_token_accuracy"}
    assert names <= rows[0].keys()
    board = list((folder / "run/tensorboard").iterdir())
    assert len(board) == 1


def test_how_full_a_steps_batches_are_is_logged(folder: Path) -> None:
    train_sft(sft_config(folder, "run", max_steps=2, tokens_per_batch=40))
    first, second = read_metrics(folder / "run")
    tokens = second["num_tokens"] - first["num_tokens"]
    assert second["num_micro_batches"] >= 2
    assert second["fill_rate"] == tokens / (40 * second["num_micro_batches"])
    assert 0.5 < second["fill_rate"] <= 1
    assert second["eval_num_micro_batches"] >= 2


@pytest.mark.parametrize(("make", "train"), [(sft_config, train_sft), (dpo_config, train_dpo)])
def test_a_batch_larger_than_the_data_takes_each_row_once(
    make: MakeConfig,
    train: Callable[[Any], Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken: list[list[int]] = []
    real = loop.indices_of_step

    def record(*arguments: Any, **options: Any) -> list[int]:
        taken.append(real(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(loop, "indices_of_step", record)
    train(make(folder, "run", max_steps=None, epochs=2.0, batch_size=64))
    rows = read_metrics(folder / "run")
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    num_rows = len(taken[0])
    assert all(sorted(indices) == list(range(num_rows)) for indices in taken)
    line = f"{num_rows} examples, train.batch_size 64: a step takes each example once"
    assert capsys.readouterr().out.count(line) == 1
    train(make(folder, "whole", max_steps=None, epochs=2.0, batch_size=num_rows))
    assert_same_weights(folder / "run", folder / "whole")
    assert "train.batch_size" not in capsys.readouterr().out


def test_prompts_of_a_batch_larger_than_the_data_are_said_to_repeat(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_ppo(ppo_config(folder, "run", max_steps=1, batch_size=30))
    expected = "13 examples, train.batch_size 30: a step samples each prompt 2 or 3 times"
    assert expected in capsys.readouterr().out
    (row,) = read_metrics(folder / "run")
    assert row["episode"] == 30 * 2


def assert_same_weights(first: Path, second: Path) -> None:
    weights = [load_file(run / "model/model.safetensors") for run in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_model_with_another_vocabulary_is_refused(folder: Path) -> None:
    save_model(tiny_model("llama", vocab_size=97), make_tokenizer(), folder / "small")
    config = sft_config(folder, "run")
    config = replace(config, model=replace(config.model, path=str(folder / "small")))
    with pytest.raises(ValueError, match="has 320 tokens, the model 97"):
        train_sft(config)


def test_data_longer_than_the_models_positions_is_refused(folder: Path) -> None:
    write_rows(folder / "texts.jsonl", [{"text": "The menu. " * 40}])
    with pytest.raises(ValueError, match=r"texts\.jsonl:1: \d+ tokens, but the model has 64"):
        train_sft(sft_config(folder, "run"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_the_learning_rate(schedule: Any, expected: list[float]) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=2)
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx(expected)


def test_a_device_that_is_not_there_is_refused() -> None:
    make: Callable[..., Any] = make_compute
    with pytest.raises(ValueError, match="expected cpu, cuda or cuda:N, got 'tpu'"):
        make(TrainConfig(device="tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            make(TrainConfig(device="cuda"))


def test_another_model_may_be_the_reference_if_its_tokens_are_the_same(folder: Path) -> None:
    save_model(tiny_model("llama", vocab_size=320, seed=1), make_tokenizer(), folder / "other")
    config = dpo_config(folder, "run", max_steps=1)
    train_dpo(replace(config, reference=replace(config.reference, path=str(folder / "other"))))
    assert read_metrics(folder / "run")[0]["loss"] != pytest.approx(0.6931471805599453, abs=1e-3)
    tokenizer = make_tokenizer(prefix_space=True)
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder / "foreign")
    config = dpo_config(folder, "refused")
    with pytest.raises(ValueError, match=r"reference\.path: expected the policy's tokens"):
        train_dpo(
            replace(config, reference=replace(config.reference, path=str(folder / "foreign")))
        )
