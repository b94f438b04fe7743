"""Heads with a low-rank adapter, beside the same heads with the merged weight W + scaling B A."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import (
    LoraWeights,
    fused_linear_loss,
    fused_linear_ppo_loss,
    fused_linear_preference_loss,
    fused_linear_sft_loss,
    linear_logprob,
    sequence_logprob,
)
from fastalign.losses import dpo
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import (
    GROUPS,
    KERNELS,
    ROWS,
    VOCABULARY,
    WIDTH,
    combined,
    group_loss,
    leaves,
    skip_unusable,
    some_targets,
)
from tests.products import matrix_product_flops

RANK, SCALING = 3, 0.5
BOUNDS = GROUPS["uneven"]
OPTIONS: dict[str, Any] = {"softcap": 4.0, "temperature": 0.8}


def operands(dtype: torch.dtype, trained: str = "hwbAB") -> dict[str, Tensor]:
    """hidden, weight, bias, lora_A and lora_B, by one letter each."""
    generator = torch.Generator().manual_seed(8)
    lora_A = torch.randn(RANK, WIDTH, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(VOCABULARY, RANK, generator=generator, dtype=torch.float64)
    values = dict(zip("hwbAB", (*leaves(torch.float64), lora_A, lora_B), strict=True))
    return {n: v.detach().to(dtype).requires_grad_(n in trained) for n, v in values.items()}


def read(values: dict[str, Tensor], function: str, *, merged: bool, **options: Any) -> list[Tensor]:
    """What the function returns, and the gradients of what is trained."""
    weight, lora = values["w"], LoraWeights(values["A"], values["B"], SCALING)
    if merged:
        weight = weight + SCALING * values["B"] @ values["A"]
        options["backend"] = "reference"
    else:
        options["lora"] = lora
    head = (values["h"], weight, some_targets())
    options |= {"bias": values["b"], **OPTIONS}
    if function == "fused_linear_loss":
        loss, metrics = fused_linear_loss(*head, BOUNDS, group_loss(BOUNDS), **options)
        found, total = [loss, metrics["entropy"]], loss
    else:
        found = list(linear_logprob(*head, return_entropy=True, **options))
        upstream = torch.linspace(-1.0, 2.0, ROWS, dtype=found[0].dtype)
        total = (found[0] * upstream).sum()
        if function == "entropy":
            total = total + (found[1] * upstream.flip(0)).sum()
    trained = [value for value in values.values() if value.requires_grad]
    return [*(value.detach() for value in found), *torch.autograd.grad(total, trained)]


@pytest.mark.parametrize(
    ("backend", "dtype", "function", "trained", "budget"),
    combined(
        KERNELS,
        ["fused_linear_loss", "logprob", "entropy"],
        ["hwbAB", "hAB", "AB", "hA", "B", "h"],
        [1_000, 3_000, None],
    ),
)
def test_like_the_merged_weight(
    backend: str, dtype: torch.dtype, function: str, trained: str, budget: int | None
) -> None:
    skip_unusable(backend, dtype)
    values = operands(dtype, trained)
    options = {"max_buffer_bytes": budget, "backend": backend}
    found = read(values, function, merged=False, **options)
    expected = read(values, function, merged=True)
    for one, other in zip(found, expected, strict=True):
        slack = 256 * torch.finfo(dtype).eps * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=slack)


@pytest.mark.parametrize("function", ["fused_linear_loss", "logprob"])
def test_the_reference_takes_an_adapter(function: str) -> None:
    values = operands(torch.float64)
    found = read(values, function, merged=False, backend="reference")
    for one, other in zip(found, read(values, function, merged=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bfloat16_operands_give_float32_log_probs() -> None:
    values = operands(torch.bfloat16)
    found = linear_logprob(
        values["h"], values["w"], some_targets(), lora=LoraWeights(values["A"], values["B"])
    )
    wide = {name: value.double() for name, value in values.items()}
    lora_hidden = (wide["h"] @ wide["A"].t()).bfloat16().double()  # rounded as peft rounds it
    logits = wide["h"] @ wide["w"].t() + lora_hidden @ wide["B"].t()
    expected = -torch.nn.functional.cross_entropy(logits, some_targets(), reduction="none")
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)
    for gradient in torch.autograd.grad(found.sum(), list(values.values())[:2]):
        assert gradient.dtype == torch.bfloat16


def test_a_frozen_weight_costs_two_large_products() -> None:
    rows, vocabulary, width = 64, 512, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    lora_A = torch.randn(1, width, requires_grad=True)
    lora_B = torch.randn(vocabulary, 1, requires_grad=True)
    lora = LoraWeights(lora_A, lora_B)
    targets, unit = torch.arange(rows), rows * vocabulary * width

    def fused() -> None:
        fused_linear_sft_loss(hidden, weight, targets, lora=lora)[0].backward()

    def logprob() -> None:
        linear_logprob(hidden, weight, targets, lora=lora).sum().backward()

    for call in (fused, logprob):
        call()
        # two of T D V; three of T V; and those of T D, without V
        assert 4 * unit < matrix_product_flops(call) < 4 * unit + 6 * unit / width + unit / 32


def test_the_drop_ins_take_an_adapter() -> None:
    values = operands(torch.float64)
    hidden, weight, targets = values["h"], values["w"], some_targets()
    lora = LoraWeights(values["A"], values["B"], SCALING)
    merged = weight + SCALING * values["B"] @ values["A"]
    zeros = torch.zeros(ROWS, dtype=torch.float64)
    bounds = [0, 5, 9, 15, ROWS]
    reference = torch.zeros(4, dtype=torch.float64)

    def losses(head: Tensor, **options: Any) -> list[Tensor]:
        return [
            fused_linear_sft_loss(hidden, head, targets, **options)[0],
            fused_linear_ppo_loss(hidden, head, targets, zeros - 4, zeros + 1, **options)[0],
            fused_linear_preference_loss(
                hidden,
                head,
                targets,
                bounds,
                lambda pairs: dpo(*pairs.logprobs()),
                reference,
                **options,
            )[0],
            sequence_logprob(hidden, head, targets, bounds, **options),
        ]

    for one, other in zip(losses(weight, lora=lora), losses(merged), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_matrices_alone_are_not_an_adapter() -> None:
    hidden, weight, _ = leaves(torch.float32)
    with pytest.raises(ValueError, match="lora: expected LoraWeights or None, got tuple"):
        linear_logprob(hidden, weight, some_targets(), lora=(hidden, weight))


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "message"),
    [
        ((3, 9), (VOCABULARY, 3), "lora.lora_A: expected (r, 8), got (3, 9)"),
        ((3, 8), (5, 3), f"lora.lora_B: expected ({VOCABULARY}, r), got (5, 3)"),
        ((8,), (VOCABULARY, 3), "lora.lora_A: expected (r, 8), got (8,)"),
        ((3, 8), (VOCABULARY, 2), "expected one rank, got 3 rows of lora_A and 2 columns"),
    ],
)
def test_wrong_matrices_are_named(
    lora_A: tuple[int, ...], lora_B: tuple[int, ...], message: str
) -> None:
    hidden, weight, _ = leaves(torch.float32)
    lora = LoraWeights(torch.zeros(lora_A), torch.zeros(lora_B))
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logprob(hidden, weight, some_targets(), lora=lora)
