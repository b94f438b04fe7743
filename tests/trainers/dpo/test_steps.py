"""What a step computes: the right loss and gradient, however it is cut."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_policy
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import sft
from fastalign.trainers.dpo import train as dpo
from tests.small_runs import dpo_config, prepared_pairs, sft_config
from tests.tolerance import assert_no_worse
from tests.trainers.dpo.step_cases import PACKINGS, dpo_gradient, eager_dpo_gradient, gradients


def test_dpo_begins_at_ln_2_with_the_eager_gradient(folder: Path) -> None:
    loss, ours = dpo_gradient(folder, "shared_prefix", 16384)
    assert abs(loss - 0.6931471805599453) < 1e-6
    eager, truth = (
        eager_dpo_gradient(folder, torch.float32),
        eager_dpo_gradient(folder, torch.float64),
    )
    assert ours.keys() == truth.keys()
    for name in truth:
        size = float(truth[name].abs().max())
        assert size > 0
        assert_no_worse(
            name,
            ours[name],
            eager[name],
            truth[name],
            dtype=torch.float32,
            length=320,
            scale=4 * size,
        )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [1, 40, 90])
@pytest.mark.parametrize("name", ["dpo", "ipo_mean", "simpo", "orpo"])
def test_dpo_does_not_depend_on_packing_or_micro_batches(
    folder: Path, packing: str, tokens: int, name: str
) -> None:
    whole_loss, whole = dpo_gradient(folder, "shared_prefix", 16384, name=name, beta=0.3)
    loss, parts = dpo_gradient(folder, packing, tokens, name=name, beta=0.3)
    assert abs(loss - whole_loss) < 2e-6 * max(1, abs(whole_loss))
    for key, value in whole.items():
        size = float(value.abs().max())
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=3e-5 * size)


def sft_gradient(folder: Path, packing: str, tokens: int) -> tuple[float, dict[str, Tensor]]:
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model = load_policy(folder / "llama", compute)
    config = sft_config(folder, "unused")
    data = load_data(config, config.data.train, load_tokenizer(folder / "llama"))
    examples = measure_examples(data.groups, compute.packing)
    total = sft.sft_gradient(model, examples, [0, 7, 3, 3, 11], compute)
    return total.loss, gradients(model)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [1, 30, 16384])
def test_sft_is_the_mean_over_tokens_however_it_is_cut(
    folder: Path, packing: str, tokens: int
) -> None:
    loss, ours = sft_gradient(folder, packing, tokens)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    losses = []
    for index in [0, 7, 3, 3, 11]:
        ids = torch.tensor([tokenizer(rows[index]["text"])["input_ids"] + [2]])
        logits = model(ids).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    truth = torch.cat(losses).mean()
    truth.backward()
    assert abs(loss - truth.item()) < 1e-5
    for name, value in gradients(model).items():
        size = float(value.abs().max())
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=3e-5 * size)


def test_the_metrics_are_trls(folder: Path) -> None:
    config = dpo_config(folder, "unused")
    model, tokenizer = load_policy(folder / "llama"), load_tokenizer(folder / "llama")
    compute = make_compute(TrainConfig(device="cpu", tokens_per_batch=30))
    data = load_data(config, config.data.train, tokenizer)
    pairs = prepared_pairs(config, model, tokenizer, data, range(12), compute)
    indices = [3, 1, 4]
    metrics = dpo.dpo_gradient(model, config.loss, pairs, indices, compute).metrics()
    for number, side in enumerate(("chosen", "rejected")):
        logits, logprobs, entropies = [], [], []
        for index in indices:
            group = data.groups[index]
            ids = torch.tensor([[*group.prompt_ids, *group.response_ids[number]]])
            found = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].detach()
            logprob = found.log_softmax(-1)
            logits.append(found.mean(-1))
            targets = torch.tensor(group.response_ids[number])[:, None]
            logprobs.append(logprob.gather(1, targets).sum())
            entropies.append(-(logprob.exp() * logprob).sum(-1))
        assert metrics[f"logits/{side}"] == pytest.approx(torch.cat(logits).mean().item(), rel=1e-4)
        assert metrics[f"logps/{side}"] == pytest.approx(sum(logprobs).item() / 3, rel=1e-5)
        assert metrics[f"rewards/{side}"] == pytest.approx(0, abs=1e-5)
    assert metrics["num_pairs"] == 3
    assert 0 < metrics["entropy"] < math.log(320)
