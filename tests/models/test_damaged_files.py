"""A damaged file of a model's folder is one line that names it, whatever a library raises."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from fastalign.compute import Compute
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from fastalign.models.load import load_policy, load_reward_model, save_model
from fastalign.models.lora_files import save_adapter
from tests.tiny import put_adapter, tiny_model, tiny_reward_model
from tests.tokenizers import make_tokenizer

PADDED = Compute(packing="padded")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, one in several files, a reward model, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    tokenizer, policy = make_tokenizer(), tiny_model("llama", vocab_size=320)
    save_model(policy, tokenizer, root / "policy")
    policy.save_pretrained(root / "parts", max_shard_size="40KB")
    tokenizer.save_pretrained(root / "parts")
    save_model(tiny_reward_model("llama", vocab_size=320), tokenizer, root / "reward")
    adapted = put_adapter(load_policy(root / "policy"))
    save_adapter(adapted, root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    return root


def load(folder: Path, kind: str) -> torch.Tensor:
    tokenizer = load_tokenizer(folder)
    eos_token_ids(tokenizer, folder)
    model = load_reward_model(folder, fresh_head=False) if kind == "reward" else load_policy(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokenizer("The menu")["input_ids"]])).logits
    return logits


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "cut in its header": lambda content: content[:20],
    "empty": lambda content: b"",
    "a huge header": lambda content: b"\xff" * 7 + content[7:],
    "noise": lambda content: random.Random(0).randbytes(200),
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("policy", "model.safetensors"),
        ("policy", "config.json"),
        ("policy", "generation_config.json"),
        ("policy", "tokenizer.json"),
        ("policy", "tokenizer_config.json"),
        ("parts", "model-00002-of-00004.safetensors"),
        ("parts", "model.safetensors.index.json"),
        ("reward", "model.safetensors"),
        ("adapter", "adapter_model.safetensors"),
        ("adapter", "adapter_config.json"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    kind: str, name: str, damage: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / kind, tmp_path / kind)
    file = tmp_path / kind / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=name) as caught:
        load(tmp_path / kind, kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def set_values(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_tensors(**values: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors |= {name.replace("__", "."): value for name, value in values.items()}
        save_file(tensors, file, metadata)

    return change


CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "policy",
            set_values(CONFIG, num_hidden_layers=1),
            r"hold 9 tensors .* does not use \(mod",
        ),
        (
            "reward",
            set_values(CONFIG, num_hidden_layers=1),
            r"hold 9 tensors .* does not use \(mod",
        ),
        ("policy", set_values(CONFIG, num_hidden_layers=3), r"are incomplete: no model\.layers\.2"),
        ("policy", set_values(CONFIG, vocab_size=300), r"is \(320, 32\), expected \(300, 32\)"),
        ("policy", set_values(CONFIG, intermediate_size=49), r"is \(32, 48\), expected \(32, 49\)"),
        ("policy", set_values(CONFIG, num_attention_heads=-1), r"config\.json"),
        ("policy", set_values(CONFIG, hidden_size=None), r"config\.json"),
        ("policy", set_values(CONFIG, rms_norm_eps=1e400), r"config\.json: rms_norm_eps is inf"),
        ("policy", set_values(CONFIG, hidden_act="x"), r"config\.json"),
        (
            "policy",
            set_values(CONFIG, rms_norm_eps=-1e6),
            r"config\.json, computes numbers that are not finite",
        ),
        (
            "policy",
            set_values(CONFIG, tie_word_embeddings=True),
            r"ties lm_head\.weight to model\.embed_tokens\.weight: the two differ",
        ),
        (
            "policy",
            set_values(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
            r"are quantised by gptq \(quantization_config",
        ),
        (
            "reward",
            set_values(CONFIG, quantization_config={"load_in_4bit": True}),
            "are quantised by",
        ),
        (
            "policy",
            set_tensors(extra__weight=torch.ones(2)),
            r"hold 1 tensors .* \(extra\.weight\)",
        ),
        (
            "policy",
            set_tensors(model__norm__weight=torch.ones(32, dtype=torch.int32)),
            r"model\.safetensors: model\.norm\.weight holds numbers of the format I32, exp",
        ),
        ("parts", set_values(INDEX, weight_map={"a": 1}), f"{INDEX}: expected a weight_map"),
        ("parts", set_values(INDEX, metadata="x"), f"{INDEX}: expected an object as metadata"),
        (
            "policy",
            set_values(GENERATION, eos_token_id=["x"]),
            r"expected token ids as eos_token_id",
        ),
        (
            "policy",
            set_values("tokenizer_config.json", model_max_length="x"),
            "tokenizer .* TypeErr",
        ),
    ],
    ids=range(19),
)
def test_files_that_do_not_go_together_are_refused_in_one_line(
    kind: str, change: Callable[[Path], None], message: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / kind, tmp_path / kind)
    change(tmp_path / kind)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / kind, kind)
    assert "\n" not in str(caught.value)


def test_what_transformers_knows_to_be_of_no_use_is_no_fault(whole: Path, tmp_path: Path) -> None:
    """A tied head that was saved too, and buffers that are computed anew."""
    expected = load(whole / "policy", "policy")
    folder = tmp_path / "policy"
    shutil.copytree(whole / "policy", folder)
    set_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))(folder)
    assert torch.equal(load(folder, "policy"), expected)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    set_tensors(lm_head__weight=embedding.clone())(folder)
    set_values(CONFIG, tie_word_embeddings=True)(folder)
    assert load(folder, "policy").isfinite().all()


def test_a_model_of_another_kind_is_a_short_line(tmp_path: Path) -> None:
    config = CLIPConfig(architectures=["CLIPModel"])
    config.save_pretrained(tmp_path)
    for compute in (Compute(), PADDED):
        with pytest.raises(ValueError, match="got CLIPModel of type 'clip'") as e:
            load_policy(tmp_path, compute)
        assert len(str(e.value)) < 250
