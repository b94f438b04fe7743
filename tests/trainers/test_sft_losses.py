"""`fastalign sft` with label smoothing and a z-loss: a gradient beside plain torch, a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

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
WEIGHTS = ("</s>:3", " b:0.25", "tery:2")
INDICES = [0, 7, 3, 3, 11]


@pytest.mark.parametrize("weights", [(), WEIGHTS], ids=["", "class weights"])
@pytest.mark.parametrize(("packing", "tokens"), [("shared_prefix", 4096), ("padded", 20)])
def test_a_steps_gradient_is_that_of_plain_torch(
    folder: Path, packing: str, tokens: int, weights: tuple[str, ...]
) -> None:
    config = sft_config(folder, "unused")
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model, tokenizer = load_policy(folder / "llama", compute), load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    examples = measure_examples(data.groups, compute.packing)
    terms = sft.terms_of(replace(LOSS, class_weights=weights), tokenizer, model)
    total = sft.sft_gradient(model, examples, INDICES, compute, terms)
    found = gradients(model)
    rows, targets = [], []
    for index in INDICES:
        prompt, ids = data.groups[index].prompt_ids, data.groups[index].response_ids[0]
        rows.append(model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1])
        targets.append(torch.tensor(ids))
    logits = torch.cat(rows)
    of_class = torch.ones(logits.shape[1])
    for text in weights:
        token, weight = text.split(":")
        of_class[tokenizer(token, add_special_tokens=False)["input_ids"]] = float(weight)
    used = of_class[torch.cat(targets)]
    assert len(used.unique()) == 1 + len(weights)
    expected = F.cross_entropy(logits, torch.cat(targets), of_class, label_smoothing=0.2)
    expected = expected + 0.1 * logits.logsumexp(-1).square().sum() / used.sum()
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
        config = sft_config(folder, run, stop_at_step=stop, eval_every=4)
        loss = replace(LOSS, class_weights=WEIGHTS)
        best = replace(config.train, best_metric="eval_cross_entropy")  # a metric of this loss
        config = replace(config, loss=loss, train=best)
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
    for wrong in ("</s>", ":2", "</s>:0", "</s>:nan", "</s>:inf"):
        with pytest.raises(ValueError, match=r"class_weights: expected TOKEN:WEIGHT with a weight"):
            SFTLoss(class_weights=(wrong,))
    with pytest.raises(ValueError, match=r"class_weights: expected a tuple of .* got '</s>:2'"):
        SFTLoss(class_weights="</s>:2")  # type: ignore[arg-type]


def test_class_weights_name_tokens(folder: Path) -> None:
    model, tokenizer = load_policy(folder / "llama"), load_tokenizer(folder / "llama")
    by_text, by_entry = " b:2", f"{tokenizer.convert_ids_to_tokens(3)}:2"  # type: ignore[attr-defined]
    terms = sft.terms_of(SFTLoss(class_weights=(by_text, by_entry)), tokenizer, model)
    (found,) = tokenizer(" b", add_special_tokens=False)["input_ids"]
    assert terms.class_weight is not None
    assert terms.class_weight.nonzero().shape == (320, 1)
    assert (terms.class_weight == 2).nonzero().flatten().tolist() == sorted([3, found])
    with pytest.raises(ValueError, match=r"class_weights: expected a token .* ' good screen', whi"):
        sft.terms_of(SFTLoss(class_weights=(" good screen:2",)), tokenizer, model)
    entry = tokenizer.convert_ids_to_tokens(found)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"class_weights: expected each token once, got .* again"):
        sft.terms_of(SFTLoss(class_weights=(by_text, f"{entry}:3")), tokenizer, model)


def test_an_unknown_word_is_no_token_to_weigh() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "good": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")  # type: ignore[no-untyped-call]
    assert [sft.token_id(tokenizer, word) for word in ("good", "<unk>")] == [1, 0]
    with pytest.raises(ValueError, match=r"class_weights: .* got 'bad', which it does not know"):
        sft.token_id(tokenizer, "bad")
