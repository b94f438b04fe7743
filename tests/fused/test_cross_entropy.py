"""Label smoothing, class weights and z-loss of a head, beside PyTorch's cross-entropy."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import LoraWeights, VocabularyShard, fused_linear_sft_loss
from fastalign.losses import cross_entropy, z_loss
from fastalign.ops import LinearHead, linear_logsumexp
from tests.fused.fused_cases import VOCABULARY, leaves, some_targets

SHARD = VocabularyShard(None, 0, VOCABULARY, VOCABULARY)


def test_the_formula_by_hand() -> None:
    # Logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8, of which the last is the target's.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    logsumexp, weights = logits.logsumexp(-1), torch.tensor([1.0, 2.0, 3.0]).double()
    mean = (weights * logits).mean(-1)
    found = cross_entropy(
        logits[:, 2] - logsumexp,
        logsumexp,
        mean,
        label_smoothing=0.3,
        target_weight=weights[2:],
        mean_weight=2.0,
    )
    # 0.7 * 3 log(8/5) + 0.3 (log 8 + 2 log 4 + 3 log(8/5)) / 3
    expected = 2.1 * math.log(1.6) + 0.1 * (math.log(8) + 2 * math.log(4) + 3 * math.log(1.6))
    assert found.item() == pytest.approx(expected)
    assert z_loss(logsumexp).item() == pytest.approx(math.log(8) ** 2)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 <= label_smoothing < 1"):
        cross_entropy(logsumexp, logsumexp, mean, label_smoothing=1.0)


def eager(
    logits: Tensor, targets: Tensor, smoothing: float, z: float, weights: Tensor | None
) -> Tensor:
    loss = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    kept = targets != -100
    count = kept.sum() if weights is None else weights[targets[kept]].sum()
    return loss + z * logits.logsumexp(-1)[kept].square().sum() / count


@pytest.mark.parametrize("budget", [None, 1_500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("smoothing", "z", "weighted"),
    [(0.2, 0.0, False), (0.0, 0.1, False), (0.0, 0.0, True), (0.2, 0.1, True)],
)
def test_it_is_pytorchs(
    budget: int | None, dtype: torch.dtype, smoothing: float, z: float, weighted: bool
) -> None:
    hidden, weight, bias = leaves(dtype)
    targets = some_targets()
    weights = torch.linspace(0.2, 2.0, VOCABULARY, dtype=dtype) if weighted else None
    loss, metrics = fused_linear_sft_loss(
        hidden,
        weight,
        targets,
        label_smoothing=smoothing,
        z_coefficient=z,
        class_weight=weights,
        bias=bias,
        max_buffer_bytes=budget,
    )
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias)
    expected = eager(logits, targets, smoothing, z, weights)
    theirs = torch.autograd.grad(expected, (hidden, weight, bias), retain_graph=True)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    torch.testing.assert_close(loss, expected, **tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance or {"rtol": 1e-4, "atol": 1e-5})
    plain = F.cross_entropy(logits, targets)
    torch.testing.assert_close(metrics["cross_entropy"], plain.detach(), **tolerance)
    assert ("z_loss" in metrics) == bool(z)


def test_an_adapter_a_scale_and_a_temperature() -> None:
    hidden, weight, _ = leaves(torch.float64)
    targets = some_targets()
    generator = torch.Generator().manual_seed(1)
    lora_a = torch.randn(2, hidden.shape[1], generator=generator, dtype=torch.float64)
    lora_b = torch.randn(VOCABULARY, 2, generator=generator, dtype=torch.float64)
    trained = [hidden, lora_a.requires_grad_(), lora_b.requires_grad_()]
    head = LinearHead(
        weight.detach(), logit_scale=0.7, lora=LoraWeights(lora_a, lora_b, scaling=0.5)
    )
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_coefficient": 0.2, "temperature": 1.3}
    loss, _ = fused_linear_sft_loss(hidden, head, targets, **options)
    ours = torch.autograd.grad(loss, trained)
    expected = eager(head.logits(hidden) / 1.3, targets, 0.1, 0.2, None)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(ours, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_log_sum_exp_and_its_gradient(softcap: float | None) -> None:
    hidden, weight, bias = leaves(torch.float64)
    targets = some_targets()
    logprob, found = linear_logsumexp(
        hidden, weight, targets, bias=bias, softcap=softcap, temperature=0.8
    )
    logits = F.linear(hidden, weight, bias)
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.8
    kept = targets != -100
    expected = torch.where(kept, logits.logsumexp(-1), 0.0)
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, len(found), dtype=torch.float64)
    ours = torch.autograd.grad((found * upstream).sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert logprob.shape == found.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= label_smoothing < 1, got 1"),
        ({"z_coefficient": -1.0}, "z_coefficient: expected a finite number not below 0"),
        ({"class_weight": torch.ones(3)}, r"class_weight: expected \(37,\), .* got \(3,\)"),
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing: expected 0 for a head with"),
        (
            {
                "z_coefficient": 0.1,
                "vocabulary_shard": VocabularyShard(None, 0, VOCABULARY, VOCABULARY),
            },
            "vocabulary_shard: expected none with label smoothing",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    hidden, weight, _ = leaves(torch.float32)
    with pytest.raises(ValueError, match=message):
        fused_linear_sft_loss(hidden, weight, some_targets(), **options)
