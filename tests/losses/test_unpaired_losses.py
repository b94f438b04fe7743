"""KTO's loss and its KL, by hand, beside Liger's and TRL's formula, and fused with a head."""

import pytest
import torch
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

from fastalign import fused_linear_kto_loss
from fastalign.losses import kto, kto_kl
from tests.fused.fused_cases import BOUNDS, eager_tokens, leaves, some_targets

POLICY = torch.tensor([-10.0, -12.0, -7.0, -9.0], dtype=torch.float64)
REFERENCE = torch.tensor([-11.0, -11.5, -7.0, -6.0], dtype=torch.float64)
GOOD = torch.tensor([True, False, True, False])


def test_kto_by_hand() -> None:
    # Log-ratios 1 and -0.5 beyond a KL of 0.4, at beta 0.1:
    # 2 (1 - sigmoid(0.06)) of a good answer, 0.5 (1 - sigmoid(0.09)) of a bad one.
    found = kto(
        POLICY[:2], REFERENCE[:2], GOOD[:2], 0.4, desirable_weight=2.0, undesirable_weight=0.5
    )
    assert found.tolist() == pytest.approx([0.9700089968, 0.2387575876], abs=1e-10)
    assert kto(POLICY, POLICY, GOOD, 0.0).tolist() == [0.5] * 4


def test_the_kl_is_a_mean_that_is_not_negative() -> None:
    policy = POLICY.clone().requires_grad_()
    assert kto_kl(policy, REFERENCE).item() == 0.0  # the mean is -0.625
    found = kto_kl(policy[:3], REFERENCE[:3])
    assert found.item() == pytest.approx(1 / 6)
    assert not found.requires_grad


def test_gradients_by_finite_differences() -> None:
    leaf = POLICY.clone().requires_grad_()

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return kto(policy, REFERENCE, GOOD, 0.3, beta=0.7, undesirable_weight=1.5)

    assert torch.autograd.gradcheck(loss, (leaf,))
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    assert gradient.sign().tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta: expected a positive number, got 0"),
        ({"desirable_weight": 0.0}, "desirable_weight: expected a positive number"),
        ({"undesirable_weight": -1.0}, "undesirable_weight: expected a positive number"),
    ],
)
def test_wrong_numbers_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kto(POLICY, REFERENCE, GOOD, 0.0, **change)
    with pytest.raises(ValueError, match=r"desirable: expected \(4,\) as policy.*got \(3,\)"):
        kto(POLICY, REFERENCE, GOOD[:3], 0.0)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_it_is_ligers(kl: float) -> None:
    expected, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        POLICY, GOOD, torch.zeros(4), REFERENCE, beta=0.3, kl=kl
    )
    found = kto(POLICY, REFERENCE, GOOD, kl, beta=0.3)
    torch.testing.assert_close(found.mean(), expected)


@pytest.mark.parametrize("budget", [None, 1_500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_loss_is_that_of_eager_lines(budget: int | None, dtype: torch.dtype) -> None:
    hidden, weight, bias = leaves(dtype)
    targets = some_targets()
    reference = torch.tensor([-14.0, -9.0, -7.5, -21.0, -13.0, -11.0], dtype=dtype)
    good = torch.tensor([True, False, False, True, True, False])
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    loss, metrics = fused_linear_kto_loss(
        hidden,
        weight,
        targets,
        torch.tensor(BOUNDS),
        reference,
        good,
        0.2,
        bias=bias,
        max_buffer_bytes=budget,
        **options,
    )
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    logprob, *_ = eager_tokens(hidden, weight, bias, targets)
    sums = torch.stack([part.sum() for part in logprob.split(torch.tensor(BOUNDS).diff().tolist())])
    expected = kto(sums, reference, good, 0.2, **options).mean()
    theirs = torch.autograd.grad(expected, (hidden, weight, bias))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    torch.testing.assert_close(loss, expected, **tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance or {"rtol": 1e-4, "atol": 1e-5})
    rewards = 0.3 * (sums - reference).detach()
    assert (metrics["num_desirable"], metrics["num_undesirable"]) == (3, 3)
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[good].mean())
    torch.testing.assert_close(metrics["rewards/rejected"], rewards[~good].mean())
    torch.testing.assert_close(metrics["logps/rejected"], sums[~good].mean().detach())
