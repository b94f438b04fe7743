"""`fastalign sft` with label smoothing and a z-loss: a gradient beside plain torch, a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_policy
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import SFTLoss, sft, train_sft
from tests.runs.test_resume import assert_same_run
from tests.small_runs import read_metrics, sft_config
from tests.trainers.dpo.step_cases import gradients

LOSS = SFTLoss(label_smoothing=0.2, z_coefficient=0.1)
INDICES = [0, 7, 3, 3, 11]


@pytest.mark.parametrize(("packing", "tokens"), [("shared_prefix", 4096), ("padded", 20)])
def test_a_steps_gradient_is_that_of_plain_torch(folder: Path, packing: str, tokens: int) -> None:
    config = sft_config(folder, "unused")
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model, tokenizer = load_policy(folder / "llama", compute), load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    examples = measure_examples(data.groups, compute.packing)
    total = sft.sft_gradient(model, examples, INDICES, compute, LOSS)
    found = gradients(model)
    rows, targets = [], []
    for index in INDICES:
        prompt, ids = data.groups[index].prompt_ids, data.groups[index].response_ids[0]
        rows.append(model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1])
        targets.append(torch.tensor(ids))
    logits = torch.cat(rows)
    expected = F.cross_entropy(logits, torch.cat(targets), label_smoothing=0.2)
    expected = expected + 0.1 * logits.logsumexp(-1).square().mean()
    expected.backward()
    assert total.loss == pytest.approx(expected.item(), rel=1e-5)
    plain = F.cross_entropy(logits, torch.cat(targets)).item()
    metrics = total.metrics()
    assert metrics["cross_entropy"] == pytest.approx(plain, rel=1e-5)
    assert metrics["z_loss"] == pytest.approx(logits.logsumexp(-1).square().mean().item(), rel=1e-5)
    for name, value in gradients(model).items():
        size = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * size)


def test_a_stopped_run_equals_a_straight_one(folder: Path) -> None:
    for run, stop in (("straight", None), ("stopped", 3)):
        config = replace(sft_config(folder, run, stop_at_step=stop, eval_every=4), loss=LOSS)
        train_sft(config)
    train = replace(config.train, stop_at_step=None)
    train_sft(replace(config, run=replace(config.run, resume=True), train=train))
    assert_same_run(folder / "straight", folder / "stopped")
    rows = read_metrics(folder / "straight")
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] < rows[0]["loss"]
    assert "eval_z_loss" in rows[-1]


def test_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss\.label_smoothing: expected a number in \[0, 1\)"):
        SFTLoss(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"loss\.z_coefficient: .* at least 0, got -1"):
        SFTLoss(z_coefficient=-1.0)
