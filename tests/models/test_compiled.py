"""Compiled layers: the same numbers, one program for every number of tokens, no new names."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fastalign.batch.packed import Group, PackedBatch, pack
from fastalign.compute import Compute
from fastalign.models.forward import response_logprob
from fastalign.models.layers import compile_layers
from tests.tiny import SETTINGS, tiny_model, with_own_layers

# torch._dynamo asks tensors for their gradient, and hides the warning only as it is shown.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(seed: int) -> PackedBatch:
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(1, most))]

    return pack([Group(tokens(9), [tokens(9), tokens(9)]) for _ in range(seed % 4 + 1)])


def model_of_layers(architecture: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    monkeypatch.setitem(SETTINGS[architecture], name, num_layers)
    return tiny_model(architecture)


def step(model: Any, batch: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = response_logprob(model, batch, Compute()).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_steps(plain: Any, compiled: Any, rtol: float) -> list[int]:
    """Compares some steps of different sizes; returns how many programs there were after each."""
    num_programs, sizes = [], set()
    with_own_layers(plain)  # which is what is compiled
    for seed in (3, 5, 2, 9, 4):
        batch = batch_of(seed)
        sizes.add(batch.num_tokens)
        (expected, gradients), (found, ours) = step(plain, batch), step(compiled, batch)
        assert found == pytest.approx(expected, rel=rtol)
        assert gradients.keys() == ours.keys()
        for name, value in gradients.items():
            size = float(value.abs().max())
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol * size)
        num_programs.append(counters["stats"]["unique_graphs"])
    assert len(sizes) == 5
    return num_programs


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_steps_are_the_same_and_compile_once(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = (model_of_layers(architecture, 4, monkeypatch) for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    num_programs = assert_same_steps(plain, compiled, 1e-5)
    assert 0 < num_programs[0] <= 6, "the layers share their programs"
    assert num_programs[1:] == num_programs[:1] * 4
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("autocast", [False, True])
def test_with_gradient_checkpointing_and_autocast(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = (model_of_layers("llama", 4, monkeypatch) for _ in range(2))
    compile_layers(compiled, backend="eager")
    for model in (plain, compiled):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        num_programs = assert_same_steps(plain, compiled, 2**-6 if autocast else 1e-5)
    assert 0 < num_programs[0] == num_programs[-1]


@pytest.mark.slow
def test_inductor_is_the_default_and_saved_names_are_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = (model_of_layers("llama", 1, monkeypatch) for _ in range(2))
    compile_layers(compiled)
    for seed in (3, 5, 2):
        batch = batch_of(seed)
        with torch.no_grad():
            expected, found = (
                response_logprob(model, batch, Compute()) for model in (plain, compiled)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # The layer and its attention module, each before and behind the attention function.
        assert counters["stats"]["unique_graphs"] == 4
    compiled.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in plain.state_dict().items())


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train\.compile: Linear has no decoder layers"):
        compile_layers(nn.Linear(2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler; no-such-compiler is not"):
        compile_layers(tiny_model("llama"))
