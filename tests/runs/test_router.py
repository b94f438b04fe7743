"""The router's loss that is added to a step's, beside transformers' own of the padded batch."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from fastalign.choices import Packing
from fastalign.compute import PACKINGS, Compute
from fastalign.models import attention
from fastalign.models.load import as_used, save_model
from fastalign.models.router import check_router
from fastalign.runs.accumulate import accumulate, measure_examples
from fastalign.runs.inputs import checkpoint_activations
from fastalign.trainers import train_reward, train_sft
from fastalign.trainers.sft import num_targets, sft_batch_loss
from tests.models.test_exactness import random_groups
from tests.small_runs import reward_config, sft_config
from tests.tiny import AS_PACKED, GROUPED
from tests.tokenizers import make_tokenizer

COEFFICIENT = 0.5


def mixture(vocab_size: int = 97) -> Any:
    attention.register()
    torch.manual_seed(0)
    config = MixtralConfig(
        **GROUPED,
        vocab_size=vocab_size,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
        attn_implementation=attention.registered_name("sdpa"),
    )
    return as_used(MixtralForCausalLM(config), AS_PACKED)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_loss_and_gradient_are_transformers(packing: Packing, checkpointing: bool) -> None:
    model, compute = mixture(), Compute(packing=packing)
    examples = measure_examples(random_groups(), packing)
    indices = range(len(examples.groups))
    rows = [
        (len(g.prompt_ids), torch.tensor([*g.prompt_ids, *r]))
        for g in examples.groups
        for r in g.response_ids
    ]
    ids = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], batch_first=True)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, (num_prompt, row) in enumerate(rows):
        mask[place, : len(row)] = 1
        labels[place, num_prompt : len(row)] = row[num_prompt:]
    theirs = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    theirs.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    if checkpointing:
        checkpoint_activations(model)
    batch_loss = partial(sft_batch_loss, model, num_targets(examples, indices), compute)
    total = accumulate(model, batch_loss, examples, indices, compute)
    assert total.loss == pytest.approx(theirs.loss.item(), abs=1e-5)
    assert total.metrics()["router_loss"] == pytest.approx(theirs.aux_loss.item(), abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    # an evaluation is of the tokens' loss alone
    measured = accumulate(model, batch_loss, examples, indices, compute, backward=False)
    alone = theirs.loss.item() - COEFFICIENT * theirs.aux_loss.item()
    assert measured.loss == pytest.approx(alone, abs=1e-5)


def test_a_loss_that_is_not_known_is_one_line() -> None:
    model = mixture()
    check_router(model, "m")
    del model.num_experts
    with pytest.raises(ValueError, match=r"router_aux_loss_coef 0\.5\), which is not known of Mix"):
        check_router(model, "m")


def test_a_run_adds_it_and_a_reward_model_does_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(mixture(vocab_size=320), make_tokenizer(), folder / "llama")
    assert train_sft(sft_config(folder, "run", max_steps=1)).finished
    (metrics,) = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics)["router_loss"] > 0
    assert train_reward(reward_config(folder, "reward", max_steps=1)).finished
    assert "the router's auxiliary loss is not added, as in transf" in capsys.readouterr().out
    assert "router_loss" not in (folder / "reward/metrics.jsonl").read_text()
