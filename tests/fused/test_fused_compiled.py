"""The drop-ins and `fused_linear_loss` inside torch.compile, in one graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign import (
    LoraWeights,
    fused_linear_dpo_loss,
    fused_linear_ppo_loss,
    fused_linear_preference_loss,
    fused_linear_sft_loss,
    sequence_logprob,
)
from fastalign.losses import simpo
from fastalign.ops.native_library import constant_in_graphs
from fastalign.ops.preference_loss import PairLogprobs
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import ROWS, leaves, some_targets

BOUNDS = [0, 5, 10, 15, ROWS]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dpo_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    reference = torch.linspace(-9.0, -7.0, 4)
    return fused_linear_dpo_loss(hidden, weight, targets, BOUNDS, reference, bias=bias)[0]


def simpo_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    def pair_loss(pairs: PairLogprobs) -> Tensor:
        sums = (pairs.policy_chosen_logprob, pairs.policy_rejected_logprob)
        return simpo(*sums, pairs.chosen_length, pairs.rejected_length, beta=2.0, gamma=1.0)

    return fused_linear_preference_loss(hidden, weight, targets, BOUNDS, pair_loss, bias=bias)[0]


def sft_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    loss, metrics = fused_linear_sft_loss(hidden, weight, targets, bias=bias, softcap=5.0)
    assert metrics["num_target_tokens"].shape == ()
    return loss


def ppo_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    old, advantage = torch.full((ROWS,), -4.0), torch.linspace(-1, 1, ROWS)
    return fused_linear_ppo_loss(
        hidden, weight, targets, old, advantage, bias=bias, entropy_coefficient=0.1
    )[0]


def sequence_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    lora = LoraWeights(weight[:2] * 0.3, weight[:, :2] * 0.2)
    return sequence_logprob(hidden, weight, targets, BOUNDS, bias=bias, lora=lora).square().sum()


@pytest.mark.parametrize("loss", [dpo_loss, simpo_loss, sft_loss, ppo_loss, sequence_loss])
def test_one_graph_and_the_same_gradients(loss: Loss) -> None:
    values, targets = leaves(torch.float32), some_targets()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = compiled(*values, targets)
    expected = loss(*values, targets)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, values)
    for one, other in zip(ours, torch.autograd.grad(expected, values), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)


def test_a_function_is_marked_constant_as_torch_does_it() -> None:
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(constant_in_graphs(lambda: 0)) == vars(marked) != {}
