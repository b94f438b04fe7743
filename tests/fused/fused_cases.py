"""Inputs and eager equivalents for the tests of the drop-in losses."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign.fused import (
    fused_linear_dpo_loss,
    fused_linear_preference_loss,
    fused_linear_sft_loss,
)
from fastalign.ops.preference_loss.pairs import PairLogprobs

VOCABULARY, WIDTH, BETA = 37, 8, 0.3
# Three pairs: chosen, rejected, chosen, ... each with a prompt of two ignored rows.
BOUNDS = [0, 7, 12, 16, 25, 31, 36]
REFERENCE = [-14.0, -9.0, -7.5, -21.0, -13.0, -11.0]
NUM_ROWS, NUM_PAIRS = BOUNDS[-1], 3
Metrics = dict[str, Tensor]
Call = Callable[..., tuple[Tensor, Metrics]]


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and bias."""
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return value.to(dtype).requires_grad_()

    return leaf(NUM_ROWS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY)


def some_targets() -> Tensor:
    targets = torch.arange(NUM_ROWS) * 5 % VOCABULARY
    for start in BOUNDS[:-1]:
        targets[start : start + 2] = -100
    return targets


def reference_logprob(dtype: torch.dtype) -> Tensor:
    return torch.tensor(REFERENCE, dtype=dtype)


def eager_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and correctness of each row, zero where ignored."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    is_target = targets != -100
    logprob = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy() * is_target
    return logprob, entropy, logits.argmax(-1) == targets


def eager_dpo(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Metrics]:
    logprob, entropy, correct = eager_tokens(hidden, weight, bias, targets)
    sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
    rewards = BETA * (sums - reference_logprob(sums.dtype))
    margins = rewards[0::2] - rewards[1::2]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    num_targets = (targets != -100).sum()
    return loss, {
        "num_pairs": torch.tensor(NUM_PAIRS),
        "num_ties": torch.tensor(0),
        "num_target_tokens": num_targets,
        "logps/chosen": sums[0::2].mean(),
        "logps/rejected": sums[1::2].mean(),
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).to(sums.dtype).mean(),
        "entropy": entropy.sum() / num_targets,
        "mean_token_accuracy": correct.sum() / num_targets,
    }


def eager_sft(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Metrics]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    _, entropy, correct = eager_tokens(hidden, weight, bias, targets)
    num_targets = (targets != -100).sum()
    return torch.nn.functional.cross_entropy(logits, targets), {
        "num_target_tokens": num_targets,
        "entropy": entropy.sum() / num_targets,
        "mean_token_accuracy": correct.sum() / num_targets,
    }


def fused_dpo(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    reference = reference_logprob(hidden.dtype)
    return fused_linear_dpo_loss(
        hidden, weight, targets, BOUNDS, reference, beta=BETA, bias=bias, **options
    )


def fused_preference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    def pair_loss(pairs: PairLogprobs) -> Tensor:
        policy_chosen, policy_rejected, chosen, rejected = pairs.logprobs()
        difference = BETA * ((policy_chosen - chosen) - (policy_rejected - rejected))
        return -torch.nn.functional.logsigmoid(difference)

    reference = reference_logprob(hidden.dtype)
    return fused_linear_preference_loss(
        hidden, weight, targets, BOUNDS, pair_loss, reference, beta=BETA, bias=bias, **options
    )


def fused_sft(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    return fused_linear_sft_loss(hidden, weight, targets, bias=bias, **options)


def assert_same(found: Metrics, expected: Metrics, dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        slack = 64 * torch.finfo(dtype).eps * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=slack, msg=f"{name}: {found[name]}"
        )


def everything(call: Call, dtype: torch.dtype, with_bias: bool, **options: Any) -> Metrics:
    """Loss, metrics and gradients in one table."""
    values = leaves(dtype)
    hidden, weight, bias = values
    given = bias if with_bias else None
    loss, metrics = call(hidden, weight, given, some_targets(), **options)
    trained = values if with_bias else values[:2]
    gradients = torch.autograd.grad(loss, trained)
    table = dict(zip("hwb", gradients, strict=False))
    return {"loss": loss.detach(), **metrics, **table}
