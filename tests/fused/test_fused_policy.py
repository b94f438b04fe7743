"""The drop-in policy loss and sequence log-probs against eager lines."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastalign import fused_linear_ppo_loss, sequence_logprob
from fastalign.losses import ppo_clip
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.ops import TokenChunk, fused_linear_loss

ROWS, VOCABULARY, WIDTH = 23, 41, 8
BOUNDS = [0, 5, 5, 14, 23]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.arange(ROWS) * 7 % VOCABULARY
    targets[[0, 4, 9]] = -100
    leaves = (normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH), normal(VOCABULARY))
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    return hidden, weight, bias, targets, normal(ROWS) - 4.0, normal(ROWS)


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (torch.nn.functional.linear(hidden, weight, bias) / 0.7).log_softmax(-1)
    target = targets != -100
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * target
    return logprob, -(log_p.exp() * log_p).sum(-1) * target


def test_ppo_clip_by_hand() -> None:
    # ratios 2, 2, 0.5, 0.5, 1.1 at epsilon 0.2
    change = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.1]).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])
    found = ppo_clip(change - 3.0, torch.full((5,), -3.0), advantage, clip_range=0.2)
    torch.testing.assert_close(found, torch.tensor([-1.2, 2.0, -0.5, 0.8, -3.3]))


def test_ppo_clip_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"advantage: expected \(2,\) as logprob has, got \(3,\)"):
        ppo_clip(torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"clip_range: expected a number in \(0, 1\), got 1.5"):
        ppo_clip(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip_range=1.5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("budget", [2_000, None])
def test_ppo_loss_gradients_and_metrics(
    budget: int | None, dtype: torch.dtype, entropy_coefficient: float, frozen: bool
) -> None:
    hidden, weight, bias, targets, old, advantage = inputs(dtype)
    trained = [hidden] if frozen else [hidden, weight, bias]
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    loss, metrics = fused_linear_ppo_loss(
        hidden,
        weight,
        targets,
        old,
        advantage,
        clip_range=0.1,
        entropy_coefficient=entropy_coefficient,
        bias=bias,
        temperature=0.7,
        max_buffer_bytes=budget,
    )
    found = torch.autograd.grad(loss, trained)
    logprob, entropy = eager(hidden, weight, bias, targets)
    target = targets != -100
    ratio = (logprob - old).exp()
    losses = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage) * target
    expected = (losses.sum() - entropy_coefficient * entropy.sum()) / target.sum()
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(loss, expected, **tolerance)
    for one, other in zip(found, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    outside = ((ratio > 1.1) & (advantage > 0)) | ((ratio < 0.9) & (advantage < 0))
    means = {
        "policy/approxkl_avg": 0.5 * (logprob - old).square(),
        "policy/clipfrac_avg": outside.to(dtype),
        "policy/entropy_avg": entropy,
        "val/ratio": ratio,
    }
    assert 0 < float(outside[target].to(dtype).mean()) < 1
    for name, value in means.items():
        torch.testing.assert_close(metrics[name], value[target].mean().detach(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_that_would_overflow_is_clamped_and_counted(
    dtype: torch.dtype, sign: float
) -> None:
    hidden, weight, _, targets, old, advantage = inputs(dtype)
    far = torch.tensor([2, 7, 20])
    old[far], advantage[far] = -200.0 * sign, torch.tensor([1.0, -1.0, -2.0], dtype=dtype)
    loss, metrics = fused_linear_ppo_loss(hidden, weight, targets, old, advantage)
    found = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found)
    assert not found[0][far].any()  # no gradient through the clamp
    assert metrics["policy/num_clamped"] == 3
    assert metrics["val/ratio"].isfinite()
    assert torch.equal(ppo_clip(old, old - 40, advantage), ppo_clip(old, old - 20, advantage))
    # inside of the bounds nothing changes
    kept = targets.clone()
    kept[far] = -100
    bounded, unbounded = (
        fused_linear_ppo_loss(hidden, weight, kept, old, advantage, max_log_ratio=bound)
        for bound in (20.0, math.inf)
    )
    assert torch.equal(bounded[0], unbounded[0])
    assert bounded[1]["policy/num_clamped"] == 0
    for one, other in zip(
        *(torch.autograd.grad(each[0], (hidden, weight)) for each in (bounded, unbounded)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_kl_in_the_loss_is_bounded_and_counted() -> None:
    logprob = torch.tensor([-100.0, -1.0, -2.0, -3.0], requires_grad=True)
    target = torch.tensor([True, True, True, False])
    reference = torch.tensor([0.0, -1.2, -1.8, 0.0])
    chunk = TokenChunk(logprob, torch.zeros(4), target, target, 0, 4, 0, 4)
    for estimator, expected in (("k3", 1), ("k2", 0)):
        loss_fn = ppo_loss_fn(
            logprob.detach(),
            torch.zeros(4),
            reference_logprob=reference,
            kl_coefficient=0.5,
            estimator=estimator,
            normaliser=3,
        )
        loss, sums = loss_fn(chunk)
        (gradient,) = torch.autograd.grad(loss, logprob)
        assert gradient.isfinite().all()
        assert (gradient[0] == 0) == (estimator == "k3")
        assert sums["policy/num_clamped"] == expected


def test_ppo_names_wrong_shapes() -> None:
    hidden, weight, _, targets, old, advantage = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"old_logprob: expected \(23,\), got \(22,\)"):
        fused_linear_ppo_loss(hidden, weight, targets, old[1:], advantage)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sequence_logprob(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets, *_ = inputs(dtype)
    options = {"bias": bias, "temperature": 0.7}
    found = sequence_logprob(hidden, weight, targets, torch.tensor(BOUNDS), **options)
    logprob, _ = eager(hidden, weight, bias, targets)
    expected = torch.stack(
        [part.sum() for part in logprob.split(torch.tensor(BOUNDS).diff().tolist())]
    )
    assert found[1] == 0
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, 4, dtype=dtype)
    leaves = (hidden, weight, bias)
    ours = torch.autograd.grad((found * upstream).sum(), leaves)
    for one, other in zip(
        ours, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sequence_logprob_is_exact_over_4096_tokens_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 64, generator=generator).bfloat16()
    weight = (torch.randn(1000, 64, generator=generator) * 3 / 8).bfloat16()
    targets = torch.randint(1000, (4096,), generator=generator)
    found = sequence_logprob(hidden, weight, targets, [0, 4096])
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None]).sum()
    assert abs(float(found) - float(expected)) < 1e-3


def test_ppo_names_a_tensor_elsewhere() -> None:
    hidden, weight, _, targets, old, advantage = inputs(torch.float32)
    with pytest.raises(ValueError, match="advantage: expected on cpu as targets are, got meta"):
        fused_linear_ppo_loss(hidden, weight, targets, old, advantage.to("meta"))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, numpy.array])
def test_bounds_may_come_from_anywhere(kind: Callable[[list[int]], Any]) -> None:
    hidden, weight, _, targets, *_ = inputs(torch.float32)
    found = sequence_logprob(hidden, weight, targets, kind(BOUNDS))
    assert torch.equal(found, sequence_logprob(hidden, weight, targets, BOUNDS))


def test_sequence_logprob_names_wrong_bounds() -> None:
    hidden, weight, _, targets, *_ = inputs(torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens: expected integers that rise from 0 to 23"):
        sequence_logprob(hidden, weight, targets, [0, 22])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("budget", [2_000, None])
def test_a_kl_in_the_loss_and_weights_of_tokens(budget: int | None, estimator: Any) -> None:
    hidden, weight, bias, targets, old, advantage = inputs(torch.float64)
    reference, weights = old.flip(0), torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
    target = targets != -100
    loss_fn = ppo_loss_fn(
        old,
        advantage,
        weight=weights,
        reference_logprob=reference,
        kl_coefficient=0.4,
        estimator=estimator,
        normaliser=20,
    )
    loss, sums = fused_linear_loss(
        hidden,
        weight,
        targets,
        None,
        loss_fn,
        bias=bias,
        temperature=0.7,
        max_buffer_bytes=budget,
    )
    loss.backward()
    found = [leaf.grad.clone() for leaf in (hidden, weight, bias) if leaf.grad is not None]
    for leaf in (hidden, weight, bias):
        leaf.grad = None
    logprob, _ = eager(hidden, weight, bias, targets)
    x = (logprob - reference)[target]
    kl = (x.square() / 2 if estimator == "k2" else ((-x).exp() - 1 + x).clamp(max=10)).sum()
    clipped = ppo_clip(logprob, old, advantage)[target] * weights[target]
    expected = clipped.sum() / 20 + 0.4 * kl / 20
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums["policy/kl_avg"], kl.detach())
    for ours, leaf in zip(found, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(ours, leaf.grad)


def test_k1_is_no_loss() -> None:
    with pytest.raises(ValueError, match=r"estimator: expected 'k2' or 'k3' .* got 'k1'"):
        ppo_loss_fn(
            torch.zeros(1),
            torch.zeros(1),
            reference_logprob=torch.zeros(1),
            estimator="k1",
            normaliser=1,
        )
