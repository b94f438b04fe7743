"""Text through a multimodal model: its text model is trained, and the rest is written as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from fastalign.compute import Compute
from fastalign.models.architecture import auto_class
from fastalign.models.load import load_policy
from fastalign.runs.config import LoraConfig
from fastalign.trainers import train_sft
from tests.small_runs import fill, sft_config
from tests.tokenizers import make_tokenizer
from tests.zoo.zoo import zoo_config


def make_folder(model_type: str, tmp_path: Path) -> Path:
    """Write data and a small multimodal model in bfloat16."""
    fill(tmp_path)
    shutil.rmtree(tmp_path / "llama")
    config = zoo_config(model_type)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/preprocessor_config.json").write_text('{"size": 8}')
    return tmp_path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_text(name: str) -> bool:
    return "language_model" in name or name.startswith("lm_head")


# a head of its own, one that is tied, and a whole causal model as the text model
@pytest.mark.parametrize(("model_type", "rank"), [("llava", 0), ("gemma3", 2), ("llama4", 2)])
def test_the_text_model_is_trained_and_the_towers_are_written_as_they_were(
    model_type: str, rank: int, tmp_path: Path
) -> None:
    folder = make_folder(model_type, tmp_path)
    config = sft_config(folder, "run", max_steps=2)
    lora = LoraConfig(rank=rank)
    config = replace(config, model=replace(config.model, lora=lora))
    # the whole model in training mode is what a tower's family may refuse
    assert train_sft(
        replace(config, train=replace(config.train, gradient_checkpointing=True))
    ).finished
    written = folder / "run/model"
    before, after = weights(folder / "llama"), weights(written)
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(map(is_text, changed))
    assert all(after[name].dtype == torch.bfloat16 for name in after)
    assert (written / "preprocessor_config.json").read_text() == '{"size": 8}'
    model, info = AutoModelForImageTextToText.from_pretrained(written, output_loading_info=True)
    architectures = json.loads((folder / "llama/config.json").read_text())["architectures"]
    assert [type(model).__name__] == architectures
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if rank:
        found = load_file(folder / "run/adapter/adapter_model.safetensors")
        assert all(map(is_text, (name.removeprefix("base_model.model.") for name in found)))


def test_towers_are_frozen_and_not_quantised(tmp_path: Path) -> None:
    folder = make_folder("llava", tmp_path)
    model = load_policy(folder / "llama")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert {name.split(".")[1] for name in frozen} == {"vision_tower", "multi_modal_projector"}
    with pytest.raises(ValueError, match="nf4 would quantise the towers"):
        load_policy(folder / "llama", Compute(), nf4=True)
