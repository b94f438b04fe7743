"""Adapters in peft's layout: peft opens ours, we open peft's, and another model's is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.models.forward import response_logprob
from fastalign.models.load import load_policy, save_model
from fastalign.models.lora import merge_adapter, quiet_peft
from fastalign.models.lora_files import save_adapter
from tests.models.test_exactness import one_at_a_time, random_groups
from tests.tiny import put_adapter, tiny_model
from tests.tokenizers import make_tokenizer

TARGETS = {"no_head": ["all-linear"], "with_head": ["all-linear", "lm_head"]}
ADAPTED = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
GROUPS = random_groups()


def make_adapter(folder: Path, architecture: str, *targets: str) -> Any:
    """A model with an adapter, its base in `folder/base` and the adapter in `folder/adapter`."""
    tiny_model(architecture).save_pretrained(folder / "base")
    model = put_adapter(load_policy(folder / "base"), *targets)
    save_adapter(model, folder / "adapter")
    return model


@ADAPTED
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_peft_and_we_open_it_with_the_same_log_probs(
    tmp_path: Path, architecture: str, targets: list[str]
) -> None:
    model = make_adapter(tmp_path, architecture, *targets)
    with torch.no_grad():
        expected = response_logprob(model, pack(GROUPS), Compute())
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with quiet_peft():
            theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
        found = one_at_a_time(theirs.get_base_model(), GROUPS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        ours = load_policy(tmp_path / "adapter")
        found = response_logprob(ours, pack(GROUPS), Compute())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        merge_adapter(model)
        save_model(model, make_tokenizer(), tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = one_at_a_time(merged, GROUPS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in saved)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"]


def test_an_adapter_that_peft_wrote_opens(tmp_path: Path) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with quiet_peft():  # of the tied head, whose base weight peft saves too
        theirs = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj", "lm_head"]))
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
        theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = load_policy(tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter/config.json").write_text("{}"), "adapter holds both"),
        (lambda f: (f / "adapter/adapter_model.safetensors").unlink(), "has no adapter_model"),
        (lambda f: (f / "adapter/adapter_model.safetensors").write_bytes(b"x"), "cannot be used: "),
        (lambda f: (f / "adapter/adapter_config.json").write_text("{"), "configuration of an adap"),
        (lambda f: change_config(f, peft_type="IA3"), "expected a LoRA adapter .* got 'IA3'"),
        (
            lambda f: change_config(f, modules_to_save=["lm_head"]),
            r"without modules_to_save, .*got \['lm_head'\]; merge it with peft",
        ),
        (
            lambda f: change_config(f, base_model_name_or_path=""),
            "name_or_path is empty",
        ),
        (lambda f: change_config(f, base_model_name_or_path="./no"), "its base ./no is not here"),
        (
            lambda f: change_config(f, base_model_name_or_path=str(f / "gpt2")),
            "cannot be used: Target modules .* not found",
        ),
        (
            lambda f: change_config(f, r=7),
            r"not made for its base .*: model.*lora_A.weight is \(3, 48\) .* expected \(7, 48\)",
        ),
        (lambda f: change_weights(f, lambda t: t.pop(FIRST)), "is None in the adapter, expected"),
        (
            lambda f: change_weights(f, lambda t: t.update({"x.lora_A.weight": t[FIRST] + 1})),
            r"x.lora_A.weight is \(3, 48\) in the adapter, expected None",
        ),
    ],
    ids=range(12),
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    make_adapter(tmp_path, "llama")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "adapter") in str(caught.value)


def test_without_peft_an_adapters_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="adapter is an adapter, which needs peft: pip install"):
        load_policy(tmp_path / "adapter")
