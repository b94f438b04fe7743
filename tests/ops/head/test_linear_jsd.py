"""The generalised Jensen-Shannon divergence of two heads: by hand, eager, and Liger's."""

import math

import pytest
import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from torch import Tensor

from fastalign.ops import LinearHead, generalised_jsd, linear_jsd

BETAS = [0.0, 0.3, 0.5, 1.0]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((7, 5), (11, 5), (11,), (7, 4), (11, 4))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    hidden, weight, bias, teacher_hidden, teacher_weight = made
    leaves = (each.requires_grad_() for each in (hidden, weight, bias))
    return (*leaves, teacher_hidden, teacher_weight)  # type: ignore[return-value]


def test_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4), beta 1/2: m = (3/8, 5/8)
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    half = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
    half += 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
    assert generalised_jsd(p, q).item() == pytest.approx(half)
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert generalised_jsd(p, q, beta=0.0).item() == pytest.approx(forward)
    assert generalised_jsd(p, q, beta=1.0).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert generalised_jsd(p, p, beta=0.3).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("budget", [None, 800])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_eagers_and_ligers(
    beta: float, budget: int | None, dtype: torch.dtype
) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight = inputs(dtype)
    head = LinearHead(weight, bias, softcap=4.0)
    found = linear_jsd(
        hidden,
        head,
        teacher_hidden,
        teacher_weight,
        beta=beta,
        temperature=1.5,
        max_buffer_bytes=budget,
    )
    upstream = torch.linspace(0.5, 2, 7, dtype=dtype)
    ours = torch.autograd.grad((found * upstream).sum(), (hidden, weight, bias))
    logits = 4.0 * torch.tanh((hidden @ weight.T + bias) / 4.0) / 1.5
    teacher = teacher_hidden @ teacher_weight.T / 1.5
    rows = [
        LigerFusedLinearJSDFunction.distillation_loss_fn(s[None], t[None], beta)
        for s, t in zip(logits, teacher, strict=True)
    ]
    expected = torch.stack(rows)
    theirs = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    torch.testing.assert_close(found, expected, **tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance or {"rtol": 1e-4, "atol": 1e-5})


def test_what_is_wrong_is_named() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight = inputs(torch.float32)
    for change, message in (
        ({"beta": 1.5}, r"beta: expected a number in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_jsd(hidden, weight, teacher_hidden, teacher_weight, **change)
    with pytest.raises(ValueError, match="teacher_weight: expected the student's 11 tokens"):
        linear_jsd(hidden, weight, teacher_hidden, teacher_weight[1:])
    with pytest.raises(ValueError, match="teacher_hidden: expected as many rows as hidden"):
        linear_jsd(hidden, weight, teacher_hidden[1:], teacher_weight)
    empty = linear_jsd(hidden[:0], weight, teacher_hidden[:0], teacher_weight)
    assert empty.shape == (0,)
