"""Which layers of a model the one-pass kernels compute, and that these are the same model."""

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastalign.models.fused_layers import fuse_layers
from fastalign.ops import layers, native_library
from tests.tiny import SETTINGS, exchanged_layers, tiny_model, with_own_layers

pytestmark = pytest.mark.skipif(
    native_library.unusable_reason("cpu") is not None, reason="the CPU library was not built"
)


def exchanged(model: nn.Module) -> set[str]:
    """Names of the classes that another has taken the place of."""
    return {type(module).__name__ for module in exchanged_layers(model)}


def hidden_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    ids, mask = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    hidden.pow(2).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", sorted(SETTINGS))
def test_a_model_with_exchanged_layers_is_the_same(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    hidden, gradients = hidden_and_gradients(model)
    plain = with_own_layers(deepcopy(model))
    plain.zero_grad()
    exact = deepcopy(plain).double()
    calls = count_calls(monkeypatch)
    own, of_plain = hidden_and_gradients(plain)
    expected, of_exact = hidden_and_gradients(exact)
    assert calls == {"rms_norm": 0, "gated_activation": 0, "rotary": 0}
    assert_no_noisier(hidden, own, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == of_plain.keys()
    for name, gradient in gradients.items():
        atol = 1e-5 * float(of_exact[name].abs().max()) + 1e-7
        assert_no_noisier(gradient, of_plain[name], of_exact[name], rtol=1e-4, atol=atol)


def assert_no_noisier(
    actual: Tensor, own: Tensor, exact: Tensor, *, rtol: float, atol: float
) -> None:
    """Assert that `actual` differs from float64 by at most a tolerance beside float32's own error.

    The float32 error of the layers' own code depends on the processor, by which sums are ordered.
    """
    atol += 2 * float((own.double() - exact).abs().max())
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts = dict.fromkeys(("rms_norm", "gated_activation", "rotary"), 0)

    def counted(name: str) -> None:
        function = getattr(layers, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(layers, name, call)

    for name in counts:
        counted(name)
    return counts


EXCHANGED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2MLP", "Gemma2Attention"},
    "gpt2": set(),
}


@pytest.mark.parametrize("architecture", EXCHANGED)
def test_which_layers_are_exchanged(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture)
    assert exchanged(model) == EXCHANGED[architecture]
    calls = count_calls(monkeypatch)
    hidden_and_gradients(model)
    assert all(bool(number) == bool(EXCHANGED[architecture]) for number in calls.values()), calls


def test_a_model_is_copied_and_pickled_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    hidden, _ = hidden_and_gradients(model)
    pickled = pickle.dumps(model)
    for again in (deepcopy(model), pickle.loads(pickled)):
        assert exchanged(again) == EXCHANGED["llama"]
        assert torch.equal(hidden_and_gradients(again)[0], hidden)
    monkeypatch.setattr(native_library, "unusable_reason", lambda device: "another machine")
    plain = pickle.loads(pickled)
    assert exchanged(plain) == set()
    torch.testing.assert_close(hidden_and_gradients(plain)[0], hidden, rtol=1e-5, atol=1e-5)


class Clamped(LlamaMLP):
    """A gated MLP whose gate has a bound."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=7.0)
        found: Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x))
        return found


class OtherEpsilon(LlamaRMSNorm):
    """A norm that adds another number than its attribute says."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        square = hidden_states.pow(2).mean(-1, keepdim=True)
        scale = torch.rsqrt(square + 2 * self.variance_epsilon)
        found: Tensor = self.weight * hidden_states * scale
        return found


class WithGate(LlamaRMSNorm):
    """A norm that may multiply by more."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        found: Tensor = super().forward(hidden_states)
        return found if gate is None else found * gate


class TwiceTheGradient(LlamaMLP):
    """A gated MLP with another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        found: Tensor = self.down_proj(2 * product - product.detach())
        return found


def test_a_layer_that_computes_something_else_keeps_its_code() -> None:
    config = SimpleNamespace(hidden_size=8, intermediate_size=16, mlp_bias=False, hidden_act="silu")
    of_relu = SimpleNamespace(**{**vars(config), "hidden_act": "relu"})
    kept: list[nn.Module] = [Clamped(config), OtherEpsilon(8), LlamaMLP(of_relu), nn.LayerNorm(8)]
    kept += [WithGate(8), TwiceTheGradient(config)]
    classes = [type(module) for module in kept]
    whole = nn.ModuleList([*kept, LlamaMLP(config), LlamaRMSNorm(8)])
    fuse_layers(whole)
    assert [type(module) for module in kept] == classes
    assert exchanged(whole) == {"LlamaMLP", "LlamaRMSNorm"}


def test_a_rotation_of_pairs_keeps_its_code() -> None:
    config = tiny_model("llama").config
    whole = nn.ModuleList([GlmAttention(config, 0), LlamaAttention(config, 0)])
    fuse_layers(whole)
    assert exchanged(whole) == {"LlamaAttention"}


def test_a_model_in_float64_takes_its_own_code() -> None:
    model = tiny_model("llama")
    wide = with_own_layers(deepcopy(model)).double()
    expected, of_plain = hidden_and_gradients(wide)
    hidden, gradients = hidden_and_gradients(model.double())
    assert hidden.dtype == torch.float64
    assert torch.equal(hidden, expected)
    assert all(torch.equal(gradient, of_plain[name]) for name, gradient in gradients.items())
