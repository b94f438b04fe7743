"""Loading a reward model: a fresh head or the saved one, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CohereConfig, LlamaForTokenClassification

from fastalign.models.load import load_policy, load_reward_model
from tests.tiny import tiny_model, tiny_reward_model


def test_a_fresh_head_is_drawn_from_its_seed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = tiny_model("llama")
    causal.save_pretrained(tmp_path)
    torch.manual_seed(1)
    first = load_reward_model(tmp_path, seed=7)
    torch.manual_seed(2)
    assert torch.equal(load_reward_model(tmp_path, seed=7).score.weight, first.score.weight)
    other = load_reward_model(tmp_path, seed=8).score.weight
    assert not torch.equal(other, first.score.weight)
    heads = [load_reward_model(tmp_path, seed=seed).score.weight for seed in range(40)]
    # 1 / sqrt(33) = 0.174; transformers' own initialisation would have 0.4 here
    assert torch.cat(heads).std().item() == pytest.approx(33**-0.5, rel=0.06)
    backbone = dict(first.base_model.named_parameters())
    for name, value in causal.base_model.named_parameters():
        assert torch.equal(backbone[name], value)
    assert "newly initialized" not in "".join(capsys.readouterr())


def test_a_saved_head_is_kept(tmp_path: Path) -> None:
    model = tiny_reward_model("llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(load_reward_model(tmp_path, seed=5).score.weight, model.score.weight)


def test_every_embedding_is_trained(tmp_path: Path) -> None:
    tiny_reward_model("llama").save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    model(torch.tensor([[5, 0, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().max() > 0


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def two_labels(folder: Path) -> None:
    config = tiny_reward_model("llama").config
    config.num_labels = 2
    type(tiny_reward_model("llama"))(config).save_pretrained(folder)


def of_tokens(folder: Path) -> None:
    LlamaForTokenClassification(tiny_reward_model("llama").config).save_pretrained(folder)


def encoder(folder: Path) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    BertModel(config).save_pretrained(folder)


def another_architecture(folder: Path) -> None:
    CohereConfig(architectures=["CohereForCausalLM"]).save_pretrained(folder)


def lost_head(folder: Path) -> None:
    tiny_reward_model("llama").save_pretrained(folder)
    rewrite(folder, lambda weights: weights.pop("score.weight"))


def lost_layer(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder)
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))


def head_with_bias(folder: Path) -> None:
    tiny_reward_model("llama").save_pretrained(folder)
    rewrite(folder, lambda weights: weights.update({"score.bias": torch.ones(1)}))


def head_of_two(folder: Path) -> None:
    tiny_reward_model("llama").save_pretrained(folder)
    rewrite(folder, lambda weights: weights.update({"score.weight": torch.ones(2, 32)}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_labels, "num_labels 1, got LlamaForSequenceClassification with num_labels 2"),
        (of_tokens, "a sequence classifier .*got LlamaForTokenClassification"),
        (encoder, "type 'bert' cannot be .* exactly: .* depends on later tokens"),
        (another_architecture, "type 'cohere' cannot be .*no sequence classifier of this type"),
        (lost_head, r"has no score\.weight"),
        (lost_layer, r"has no model\.norm\.weight"),
        (head_with_bias, r"has a score\.bias"),
        (head_of_two, r"score\.weight is \(2, 32\), expected \(1, 32\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_reward_model_is_refused_in_one_line(
    make: Any, message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_reward_model(tmp_path)
    assert str(caught.value).count("\n") == 0


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: no model can be loaded from .*nothing"):
        load_reward_model(tmp_path / "nothing")


def test_a_reward_model_is_no_policy_and_a_policy_does_not_score(tmp_path: Path) -> None:
    tiny_reward_model("llama").save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="expected a causal model, got LlamaForSequenceClass"):
        load_policy(tmp_path / "reward")
    tiny_model("llama").save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"expected a trained reward model, got .*ForCausalLM"):
        load_reward_model(tmp_path / "policy", fresh_head=False)


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is an adapter; merge it first \(fastalign merge\)"):
        load_reward_model(tmp_path / "adapter")
