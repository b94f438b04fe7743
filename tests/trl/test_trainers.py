"""Each trainer beside TRL's own: equal losses, gradients and metrics under each option.

TRL's code computes the losses of both, from per-token results of a head; the head is what differs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM

from tests.trl.trl_cases import (
    LORA,
    ROWS,
    assert_equal_steps,
    assert_equal_with,
    first_batch,
    make_trainers,
    step,
)

# TRL and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def with_reference(models: Path) -> Any:
    def arguments() -> dict[str, Any]:
        folder = models / "reference"
        return {"ref_model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}

    return arguments


def with_adapter() -> dict[str, Any]:
    return {"peft_config": LORA}


PLAIN = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
)
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# Fields that the constructor copies from its configuration.
DPO_FIELDS: list[dict[str, Any]] = [
    *({"loss_types": [name]} for name in PLAIN),
    *({"loss_types": [name], "label_smoothing": 0.1} for name in SMOOTHED),
    {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"ld_alpha": 0.5},
    {"f_divergence_type": "forward_kl", "beta": 0.01},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
]


def test_every_loss_of_dpo(models: Path) -> None:
    theirs, ours = make_trainers("DPOTrainer", models, ROWS, {}, with_reference(models))
    batch = first_batch(ours)
    for fields in DPO_FIELDS:
        assert_equal_with(theirs, ours, batch, **fields)
    for trainer in (theirs, ours):  # as the training loop does by default
        trainer.model.gradient_checkpointing_enable()
    assert_equal_steps(theirs, ours, batch)


@pytest.mark.parametrize(
    ("options", "arguments", "model"),
    [
        ({}, {"peft_config": LORA}, "llama"),
        ({"precompute_ref_log_probs": True}, {"peft_config": LORA}, "llama"),
        ({}, {"peft_config": PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)}, "llama"),
        ({"precompute_ref_log_probs": True, "max_length": 9}, {}, "llama"),
        ({"use_weighting": True, "truncation_mode": "keep_end", "max_length": 9}, {}, "llama"),
        ({}, {"peft_config": LORA}, "gemma2"),  # a softcap
        ({"router_aux_loss_coef": 0.1}, {"peft_config": LORA}, "mixtral"),
    ],
    ids=["lora", "lora-precomputed", "prompt", "precomputed", "weighted", "softcap", "experts"],
)
def test_options_of_dpo(
    options: dict[str, Any], arguments: dict[str, Any], model: str, models: Path
) -> None:
    given = (lambda: arguments) if arguments else with_reference(models)
    theirs, ours = make_trainers("DPOTrainer", models, ROWS, options, given, model)
    batch = first_batch(ours)
    for name, value in first_batch(theirs).items():  # precomputed log-probs
        torch.testing.assert_close(batch[name], value, rtol=1e-5, atol=1e-5)
    assert_equal_steps(theirs, ours, batch)


def test_bfloat16(models: Path) -> None:
    arguments = with_reference(models)
    theirs, ours = make_trainers("DPOTrainer", models, ROWS, {"bf16": True}, arguments)
    losses = []
    for trainer in (theirs, ours):
        trainer.model = trainer.accelerator.prepare_model(trainer.model)  # autocast
        losses.append(step(trainer, first_batch(trainer))[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_training_with_accumulated_gradients(models: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainers = make_trainers("DPOTrainer", models, ROWS, options, with_reference(models))
    logs = []
    for trainer in trainers:
        trainer.train()
        logs.append([one for one in trainer.state.log_history if "rewards/margins" in one])
    assert len(logs[0]) == len(logs[1]) == 2
    for expected, found in zip(*logs, strict=True):
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, models: Path) -> None:
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if good else "rejected"],
            "label": good,
        }
        for good in (True, False)
        for row in ROWS
    ]
    theirs, ours = make_trainers(
        "KTOTrainer", models, rows, {"loss_type": loss_type}, with_reference(models)
    )
    assert_equal_steps(theirs, ours, first_batch(theirs))


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"packing": True, "max_length": 16}])
def test_sft(options: dict[str, Any], models: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    theirs, ours = make_trainers("SFTTrainer", models, rows, options, with_adapter)
    assert_equal_steps(theirs, ours, first_batch(theirs))


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


SAMPLING = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.7}
# As DPO_FIELDS; those of `args` are read from the configuration.
GRPO_FIELDS: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")),
    *({"loss_type": name} for name in ("luspo", "vespo")),
    {"importance_sampling_level": "sequence", "epsilon_high": 0.5},
    {"beta": 0.0},
    {"top_entropy_quantile": 0.5},
    {"_entropy_bonus_enabled": True, "entropy_coef": 0.1},
    {"off_policy_mask_threshold": 0.01},
    {"use_vllm": True, "vllm_importance_sampling_correction": True},
]


def make_uneven(batch: dict[str, Any]) -> None:
    """Give completions different lengths, one left out, and ratios of which some are clipped."""
    torch.manual_seed(2)
    noise = 0.5 * torch.randn(batch["completion_ids"].shape)
    batch["completion_mask"] = (torch.arange(6) < torch.tensor([[6], [5], [3], [0]])).long()
    batch["advantages"] = torch.tensor([1.0, -0.5, 0.25, -1.0])
    batch["importance_sampling_ratio"] = noise.exp()
    for name, scale in (("old_per_token_logps", 1), ("ref_per_token_logps", -1)):
        if name in batch:
            batch[name] = batch[name] + scale * noise
    if "old_logps" in batch:
        batch["old_logps"] = batch["old_logps"] + noise.sum(1)


@pytest.mark.parametrize("adapted", [False, True])
def test_grpo(adapted: bool, models: Path) -> None:
    options = {
        "beta": 0.1,
        "delta": 1.5,
        "use_bias_correction_kl": True,
        "num_iterations": 2,
        "steps_per_generation": 2,
        "cast_lm_head_to_fp32": not adapted,
        **SAMPLING,
    }

    def arguments() -> dict[str, Any]:
        return {"reward_funcs": [length_reward], **(with_adapter() if adapted else {})}

    rows = [{"prompt": row["prompt"]} for row in ROWS]
    theirs, ours = make_trainers("GRPOTrainer", models, rows, options, arguments)
    expected, batch = first_batch(theirs), first_batch(ours)
    assert {"old_per_token_logps", "ref_per_token_logps"} <= batch.keys()
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=1e-5, atol=1e-5, msg=name)
    make_uneven(batch)
    for fields in GRPO_FIELDS if not adapted else GRPO_FIELDS[:1]:
        assert_equal_with(theirs, ours, batch, **fields)


def test_rloo(models: Path) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    theirs, ours = make_trainers(
        "RLOOTrainer", models, rows, SAMPLING, lambda: {"reward_funcs": [length_reward]}
    )
    batch = first_batch(ours)
    first_batch(theirs)
    make_uneven(batch)
    assert_equal_steps(theirs, ours, batch)
