"""A trainer of TRL and ours on equal models and rows, and what one step of each gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM, set_seed

import fastalign.trl
from tests.tiny import GROUPED, tiny_model
from tests.tokenizers import make_tokenizer

LORA = LoraConfig(r=2, target_modules="all-linear")
ROWS = [
    {"prompt": "What is the best phone?", "chosen": " The one that you like.", "rejected": " no"},
    {"prompt": "The screen is", "chosen": " too dim.", "rejected": " excellent and very good."},
    {"prompt": "The menu", "chosen": " is slow", "rejected": " is very good, yes yes"},
    {"prompt": "maybe", "chosen": " yes no yes", "rejected": " slow slow"},
]
VOCABULARY = len(make_tokenizer())


def save_models(folder: Path) -> None:
    """Write the models that trainers load: each is loaded twice, so that equal ones begin."""
    for name, architecture, seed in (
        ("llama", "llama", 0),
        ("reference", "llama", 1),
        ("gemma2", "gemma2", 0),
    ):
        tiny_model(architecture, vocab_size=VOCABULARY, seed=seed).save_pretrained(folder / name)
    torch.manual_seed(0)
    experts = MixtralConfig(
        vocab_size=VOCABULARY, num_local_experts=3, num_experts_per_tok=2, **GROUPED
    )
    MixtralForCausalLM(experts).save_pretrained(folder / "mixtral")


def make_trainers(
    name: str,
    models: Path,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    make_arguments: Callable[[], dict[str, Any]] = dict,
    model: str = "llama",
) -> tuple[Any, Any]:
    """Return TRL's trainer `name` and ours, with equal adapters that change the model."""
    config = getattr(trl, name.replace("Trainer", "Config"))
    made = []
    for kind in (getattr(trl, name), getattr(fastalign.trl, f"Fused{name}")):
        arguments = make_arguments()  # two references: each trainer changes its own
        settings = {
            "output_dir": str(models / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
        trainer = kind(
            str(models / model),
            args=config(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            **arguments,
        )
        if "peft_config" in arguments:
            torch.manual_seed(5)
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.2)
        made.append(trainer)
    return made[0], made[1]


def first_batch(trainer: Any) -> dict[str, Any]:
    """Return the first batch; samples are drawn with one seed."""
    set_seed(3)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


def step(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients of a batch, by parameter."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.detach(), found


def assert_equal_steps(theirs: Any, ours: Any, batch: dict[str, Any]) -> None:
    """Compare losses, all gradients and all metrics."""
    expected, expected_gradients = step(theirs, batch)
    loss, gradients = step(ours, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        scale = max(float(expected_gradients[name].abs().max()), 1e-3 * largest)
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=2e-5 * scale, msg=name
        )
    assert_equal_metrics(theirs, ours)


def assert_equal_with(theirs: Any, ours: Any, batch: dict[str, Any], **fields: Any) -> None:
    """Compare a step of both trainers with other values of their fields, which are put back."""
    before = {name: getattr(ours, name) for name in fields}
    for trainer in (theirs, ours):
        for name, value in fields.items():
            setattr(trainer, name, value)
        trainer._metrics["train"].clear()
    try:
        assert_equal_steps(theirs, ours, batch)
    except AssertionError as error:
        raise AssertionError(f"{fields}: {error}") from error
    finally:
        for trainer in (theirs, ours):
            for name, value in before.items():
                setattr(trainer, name, value)


def assert_equal_metrics(theirs: Any, ours: Any) -> None:
    expected, found = theirs._metrics["train"], ours._metrics["train"]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        left, right = torch.tensor(found[name]), torch.tensor(values)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
