"""Outputs that a backward computes again: the same gradients, from fewer tensors."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.models.fused_layers import fuse_layers
from fastalign.models.lora import add_adapter
from fastalign.ops import layers, native_library, recomputed
from fastalign.ops.recomputed import recomputed_outputs

pytestmark = pytest.mark.skipif(
    native_library.unusable_reason("cpu") is not None, reason="the CPU library was not built"
)

WIDTH, INNER, LAYERS, TOKENS = 32, 80, 3, 70


def make_model(*, adapter: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **heads)).train()
    if adapter:
        add_adapter(model, rank=2, alpha=4.0, targets=("all-linear",))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    fuse_layers(model)
    return model


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes of distinct storages that a forward keeps for its backward, those of weights too."""
    sizes: dict[int, int] = {}
    alive = []  # so that no address comes twice
    total = [0]

    def count(kept: Any) -> Any:
        found = pack(kept)
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            alive.append(found)
            total[0] = sum(sizes.values())
        return found

    pack = recomputed._pack
    recomputed._pack = count  # type: ignore[assignment]
    try:
        yield total
    finally:
        recomputed._pack = pack


def gradients(model: Any, context: Any) -> list[Tensor]:
    ids = torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with context:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    trained = [p for p in model.get_decoder().parameters() if p.requires_grad]
    return list(torch.autograd.grad(hidden.square().sum(), trained))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_has_the_same_gradients_to_the_bit_and_keeps_no_such_output(adapter: bool) -> None:
    model = make_model(adapter=adapter)
    before = gradients(model, nullcontext())
    with kept_bytes() as fewer:
        after = gradients(model, recomputed_outputs())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    as_before = pytest.MonkeyPatch()
    with as_before.context() as patch, kept_bytes() as all_of_them:
        patch.setattr(layers, "recompute", lambda *_: None)
        gradients(model, recomputed_outputs())
    saved = LAYERS * (2 * WIDTH + INNER)  # two norms, and a product with a gate
    saved -= adapter * WIDTH  # nothing before the first norm has a gradient, so it keeps no input
    assert all_of_them[0] - fewer[0] == 4 * TOKENS * saved


def test_an_output_is_made_once_for_all_that_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    make = layers._norm_rows

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(layers, "_norm_rows", counted)
    x = torch.randn(5, 8, requires_grad=True)
    weights = [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
    with recomputed_outputs():
        normed = layers.rms_norm(x, torch.ones(8), 0.0, 1e-6)
        total = sum((normed @ w.t()).sum() for w in weights)
    assert isinstance(total, Tensor)
    del normed
    total.backward(retain_graph=True)
    assert len(calls) == 2
    first = [w.grad.clone() for w in weights if w.grad is not None]
    total.backward()  # by the kept graph again
    assert all(torch.equal(w.grad, 2 * g) for w, g in zip(weights, first, strict=True))


def tripled(normed: Tensor) -> Tensor:
    normed *= 3  # such as a hook on the norm may do
    return normed


@pytest.mark.parametrize(
    "between",
    [tripled, lambda normed: normed.t()[1:, :3]],
    ids=["changed in place, which is kept", "a view, which is read as it was"],
)
def test_what_happens_to_an_output_before_it_is_read(between: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    found = []
    for context in (nullcontext(), recomputed_outputs()):
        with context:
            rows = between(layers.rms_norm(x, torch.ones(4), 0.0, 1e-6))
            weight = torch.ones(rows.shape[1], 3, requires_grad=True)
            total = (rows @ weight).square().sum()
        found.append(torch.autograd.grad(total, [x, weight]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_checkpoint_keeps_nothing_more() -> None:
    """What a layer under a checkpoint has made is not held for a second computation."""
    x = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    inner: list[Any] = []

    def layer(x: Tensor) -> Tensor:
        hidden = x * 2
        inner.append(hidden.untyped_storage()._weak_ref())
        return layers.rms_norm(hidden, torch.ones(64), 0.0, 1e-6) @ weight

    with recomputed_outputs():
        total = checkpoint(layer, x, use_reentrant=False).sum()
    gc.collect()
    assert torch.UntypedStorage._expired(inner[0])
    (with_checkpoint,) = torch.autograd.grad(total, [weight])
    (without,) = torch.autograd.grad(layer(x).sum(), [weight])
    assert torch.equal(with_checkpoint, without)


def test_nothing_is_left_behind() -> None:
    model = make_model()
    gc.collect()
    others = list(recomputed._outputs.values())  # tensors that another test's fixture holds

    def found() -> list[Any]:
        gc.collect()
        return [each for each in recomputed._outputs.values() if each not in others]

    gradients(model, recomputed_outputs())
    assert not found()
    x = torch.randn(3, 8, requires_grad=True)
    normed = layers.rms_norm(x, torch.ones(8), 0.0, 1e-6)
    assert not found(), "outside of the context nothing is recorded"
    with torch.no_grad(), recomputed_outputs():
        normed = layers.rms_norm(x, torch.ones(8), 0.0, 1e-6)
    assert not found()
    with recomputed_outputs():
        normed = layers.rms_norm(x, torch.ones(8), 0.0, 1e-6)
    assert len(found()) == 1
    del normed
    assert not found()
