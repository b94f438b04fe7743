"""Our reward step beside TRL's RewardTrainer: the same loss, gradient and metrics on the same rows.

Both must read the same token. TRL finds a response's last token as the last that is not the pad
token, so under a pad token that is the EOS it reads the token before; here the two differ. The
rows' prompts end where no token crosses the boundary, and both begin with the same head.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_reward_model, save_reward_model
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import REWARD_LOSSES
from fastalign.trainers.reward import train as reward
from tests.small_runs import reward_config, write_rows
from tests.tiny import tiny_reward_model
from tests.tokenizers import make_tokenizer

# TRL and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [
    {"prompt": "What is the best phone?", "chosen": " The one that you like.", "rejected": " no"},
    {"prompt": "The screen is", "chosen": " too dim.", "rejected": " excellent and very good."},
    {"prompt": "The menu", "chosen": " is slow", "rejected": " is very good, yes yes"},
]


@pytest.mark.parametrize("margin", [False, True])
def test_the_same_loss_gradient_and_metrics(margin: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = [{**row, "margin": 0.5 * n} if margin else row for n, row in enumerate(ROWS)]
    model = tiny_reward_model("llama", vocab_size=320)
    save_reward_model(model, make_tokenizer(), tmp_path / "llama")
    theirs = trl.RewardTrainer(
        model=tiny_reward_model("llama", vocab_size=320),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=3,
            max_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            center_rewards_coefficient=0.05,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    batch = theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}

    config = reward_config_of(tmp_path, rows)
    ours = load_reward_model(tmp_path / "llama")
    compute = make_compute(TrainConfig(device="cpu"))
    data = load_data(config, config.data.train, load_tokenizer(tmp_path / "llama"))
    in_trl = {tuple(ids[mask.bool()].tolist()) for ids, mask in pairs_of(batch)}
    assert {(*g.prompt_ids, *r) for g in data.groups for r in g.response_ids} == in_trl
    pairs = reward.prepare_comparisons(config.loss, data, compute)
    metrics = reward.reward_gradient(ours, config.loss, pairs, range(3), compute).metrics()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss"] > 0.1
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-4 * scale)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        (value,) = theirs._metrics["train"][name]
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


def pairs_of(batch: dict[str, torch.Tensor]) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def reward_config_of(folder: Path, rows: list[dict[str, Any]]) -> Any:
    write_rows(folder / "pairs.jsonl", rows)
    config = reward_config(folder, "unused")
    return replace(
        config,
        data=replace(config.data, train=str(folder / "pairs.jsonl")),
        loss=REWARD_LOSSES["bradley_terry"](centring_coefficient=0.05),
    )
