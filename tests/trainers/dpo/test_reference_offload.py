"""Another model as the reference: loaded once, in host memory if asked for, and freed."""

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.layers import offload_layers
from fastalign.models.load import load_policy, save_model
from fastalign.runs import frozen
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import DPOConfig, ReferenceConfig, train_dpo
from fastalign.trainers.dpo import train as dpo
from tests.small_runs import dpo_config, prepared_pairs, read_metrics
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer


def config_with_reference(folder: Path, run: str, architecture: str, **options: Any) -> DPOConfig:
    model = tiny_model(architecture, vocab_size=320, seed=1)
    if architecture == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight
    save_model(model, make_tokenizer(), folder / "other")
    options.setdefault("cache_dir", str(folder / run / "cache"))
    return replace(
        dpo_config(folder, run, max_steps=2),
        reference=ReferenceConfig(path=str(folder / "other"), **options),
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_offloaded_reference_has_the_same_log_probs(
    folder: Path, architecture: str, precision: str
) -> None:
    compute = make_compute(TrainConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
    policy, tokenizer = load_policy(folder / "llama"), load_tokenizer(folder / "llama")
    found = []
    for offload in (False, True):
        name = f"offload-{offload}"
        config = config_with_reference(folder, name, architecture, offload=offload)
        data = load_data(config, config.data.train, tokenizer)
        found.append(prepared_pairs(config, policy, tokenizer, data, range(12), compute).reference)
    # The same file's name: the fingerprint is taken while the weights are there.
    (first,), (second,) = (
        sorted((folder / f"offload-{offload}/cache").glob("*.safetensors"))
        for offload in (False, True)
    )
    assert first.name == second.name
    assert found[0] is not None
    assert found[1] is not None
    assert bool(found[0].isfinite().all())
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_layers_weights_are_there_only_while_it_is_computed(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = model.model.layers if architecture == "llama" else model.transformer.h
    offload_layers(model, torch.device("cpu"))
    kept = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    assert kept == ["lm_head.weight"]

    def devices() -> list[set[str]]:
        return [{p.device.type for p in layer.parameters()} for layer in layers]

    seen = []
    for layer in layers:
        inside = layer.mlp
        inside.register_forward_hook(lambda *_: seen.append(devices()))
    model.base_model(torch.tensor([[5, 6, 7]]))
    assert seen == [[{"cpu"}, {"meta"}], [{"meta"}, {"cpu"}]]
    assert devices() == [{"meta"}, {"meta"}]


@pytest.mark.parametrize("offload", [False, True])
def test_the_reference_is_loaded_once_and_gone_before_the_first_step(
    folder: Path, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load, step = frozen.load_model, dpo.dpo_gradient

    def watched_load(*arguments: Any) -> Any:
        model, tokenizer = load(*arguments)
        loaded.append(weakref.ref(model.base_model))
        return model, tokenizer

    def watched_step(*arguments: Any) -> Any:
        assert [found() for found in loaded] == [None]
        return step(*arguments)

    monkeypatch.setattr(frozen, "load_model", watched_load)
    monkeypatch.setattr(dpo, "dpo_gradient", watched_step)
    config = config_with_reference(folder, "run", "llama", offload=offload)
    train_dpo(config)  # with held-out data, which needs the reference too
    assert len(loaded) == 1
    assert "eval_loss" in read_metrics(folder / "run")[-1]


def test_what_offloading_needs_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"reference\.offload: needs --reference\.path"):
        ReferenceConfig(offload=True)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"needs accelerate: pip install 'fastalign\[offload\]'"):
        train_dpo(config_with_reference(folder, "run", "llama", offload=True))
