"""Bases of 4 bits: the numbers and gradients of the dense model with the same rounded weights."""

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.models.forward import response_logprob
from fastalign.models.load import load_policy, model_fingerprint
from fastalign.models.lora import merge_adapter
from fastalign.models.low_bit import dense_layer, is_quantised
from tests.models.test_exactness import random_groups
from tests.tiny import put_adapter, tiny_model

ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
BATCH = pack(random_groups())


def load(folder: Path, architecture: str, **options: Any) -> Any:
    if not folder.joinpath(architecture).exists():
        tiny_model(architecture).save_pretrained(folder / architecture)
    return load_policy(folder / architecture, **options)


def make_dense(model: Any) -> Any:
    """The model with its 4-bit weights written out in float32."""
    for name, part in list(model.named_modules()):
        if is_quantised(part):
            model.set_submodule(name, dense_layer(part, torch.float32))
    return model


def logprob_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logprob = response_logprob(model, BATCH, Compute())
    (torch.linspace(-1, 1, logprob.numel()) * logprob).sum().backward()
    return logprob.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("train", [False, True])
@ARCHITECTURES
def test_like_the_dense_model_with_the_same_weights(
    tmp_path: Path, architecture: str, train: bool
) -> None:
    targets = ("all-linear", "lm_head")
    model = put_adapter(load(tmp_path, architecture, nf4=True), *targets).train(train)
    with torch.no_grad():  # on some CPUs bitsandbytes packs weights at such a forward
        response_logprob(model, BATCH, Compute())
    found, gradients = logprob_and_gradients(model)
    dense = put_adapter(make_dense(load(tmp_path, architecture, nf4=True)), *targets)
    expected, expected_gradients = logprob_and_gradients(dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        size = float(gradient.abs().max())
        assert size > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_but_the_head_is_quantised(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(tmp_path, "llama", nf4=True, dtype=dtype)
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    dense = [name for name, part in linear.items() if not is_quantised(part)]
    assert dense == ["lm_head"]
    assert len(linear) == 15
    assert all(isinstance(linear[n], bitsandbytes.nn.Linear4bit) for n in linear if n not in dense)
    assert {part.dtype for part in (model.lm_head.weight, model.model.norm.weight)} == {dtype}
    assert {linear[n].weight.quant_state.quant_type for n in linear if n not in dense} == {"nf4"}


@pytest.mark.parametrize("targets", [["all-linear", "lm_head"], ["v_proj"]], ids=str)
def test_merging_writes_out_what_was_trained(tmp_path: Path, targets: list[str]) -> None:
    model = put_adapter(load(tmp_path, "llama", nf4=True), *targets)
    with torch.no_grad():
        expected = response_logprob(model, BATCH, Compute())
        merge_adapter(model)
        model.save_pretrained(tmp_path / "merged")
        assert not any(is_quantised(part) for part in model.modules())
        found = response_logprob(load(tmp_path, "merged"), BATCH, Compute())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_base_has_one_fingerprint(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", nf4=True)
    first = model_fingerprint(model)
    with torch.no_grad():
        response_logprob(model, BATCH, Compute())
    assert model_fingerprint(model) == first
    assert model_fingerprint(put_adapter(model)) == first
    assert model_fingerprint(load(tmp_path, "llama", nf4=True)) == first
    assert model_fingerprint(load(tmp_path, "llama")) != first
    part = model.model.layers[1].mlp.up_proj.base_layer
    part.weight.data[3] ^= 1
    assert model_fingerprint(model) != first


def test_without_bitsandbytes_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"model\.lora\.base: nf4 needs bitsandbytes: pip install"):
        load(tmp_path, "llama", nf4=True)
