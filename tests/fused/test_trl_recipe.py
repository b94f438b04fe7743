"""The recipe of docs/trl.md, as it is written there, against the installed TRL."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

# TRL and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's own trainer and the recipe's, on equal models and rows."""
    trl = pytest.importorskip("trl")
    (code,) = re.findall(r"```python\n(.*?)```", RECIPE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/trl.md", "exec"), names)  # the documented code itself
    rows = [
        {
            "prompt": "What is the best phone?",
            "chosen": " The one that you like.",
            "rejected": " no",
        },
        {"prompt": "The screen is", "chosen": " too dim.", "rejected": " excellent and very good."},
        {"prompt": "The menu", "chosen": " is slow", "rejected": " is very good, yes yes"},
    ]
    tokenizer = make_tokenizer()
    made = {}
    for name, kind in (("trl", trl.DPOTrainer), ("fused", names["FusedDPOTrainer"])):
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp(name)),
            per_device_train_batch_size=3,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            beta=0.3,
            seed=3,
            save_strategy="no",
        )
        made[name] = kind(
            model=tiny_model("llama", vocab_size=len(tokenizer)),
            ref_model=tiny_model("llama", vocab_size=len(tokenizer), seed=1),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    return made


def loss_and_gradients(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return loss.detach(), gradients


def test_the_same_loss_and_gradients(trainers: dict[str, Any]) -> None:
    expected, expected_gradients = loss_and_gradients(trainers["trl"])
    loss, gradients = loss_and_gradients(trainers["fused"])
    assert abs(float(expected) - 0.6931) > 1e-2  # the reference is another model
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-4 * scale)


def test_training_logs_the_same_numbers(trainers: dict[str, Any]) -> None:
    logs = {}
    for name, trainer in trainers.items():
        trainer._metrics["train"].clear()
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(logs["trl"]) == len(logs["fused"]) == 2
    for expected, found in zip(logs["trl"], logs["fused"], strict=True):
        for key in ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "entropy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
