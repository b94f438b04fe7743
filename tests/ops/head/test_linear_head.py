"""Every operation on a head takes a `LinearHead` in place of a weight and keywords."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import (
    LinearHead,
    LoraWeights,
    VocabularyShard,
    fused_linear_dpo_loss,
    fused_linear_loss,
    fused_linear_ppo_loss,
    fused_linear_preference_loss,
    fused_linear_sft_loss,
    linear_logprob,
    sequence_logprob,
)
from fastalign.losses import dpo, formula
from fastalign.ops import TokenChunk, linear_kl
from tests.ops.head.linear_logprob.linear_logprob_cases import ROWS, WIDTH, leaves, some_targets

BOUNDS = [0, 5, 9, 16, ROWS]
KEYWORDS = ("bias", "softcap", "logit_scale", "lora")


def whole_head() -> tuple[Tensor, LinearHead]:
    hidden, weight, bias = leaves(torch.float32)
    generator = torch.Generator().manual_seed(5)
    lora = LoraWeights(
        torch.randn(2, WIDTH, generator=generator).requires_grad_(),
        torch.randn(weight.shape[0], 2, generator=generator).requires_grad_(),
        scaling=0.5,
    )
    return hidden, LinearHead(weight, bias, softcap=2.0, logit_scale=0.7, lora=lora)


def squares(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
    return chunk.logprob.square().sum(), {}


OPERATIONS: dict[str, Any] = {
    "linear_logprob": lambda h, w, t, **o: linear_logprob(h, w, t, **o).square().sum(),
    "sequence_logprob": lambda h, w, t, **o: sequence_logprob(h, w, t, BOUNDS, **o).sum(),
    "fused_linear_loss": lambda h, w, t, **o: fused_linear_loss(h, w, t, None, squares, **o)[0],
    "sft": lambda h, w, t, **o: fused_linear_sft_loss(h, w, t, **o)[0],
    "dpo": lambda h, w, t, **o: fused_linear_dpo_loss(h, w, t, BOUNDS, torch.zeros(4), **o)[0],
    "preference": lambda h, w, t, **o: fused_linear_preference_loss(
        h, w, t, BOUNDS, formula(dpo, beta=0.1), torch.zeros(4), **o
    )[0],
    "ppo": lambda h, w, t, **o: fused_linear_ppo_loss(
        h, w, t, torch.zeros(ROWS), torch.ones(ROWS), **o
    )[0],
}


def results(operation: str, as_head: tuple[str, ...]) -> list[Tensor]:
    """Loss and gradients, with these fields in the head and the others as keywords."""
    hidden, head = whole_head()
    options = {name: getattr(head, name) for name in KEYWORDS if name not in as_head}
    fields = {name: getattr(head, name) for name in as_head}
    weight = LinearHead(head.weight, **fields) if as_head else head.weight
    loss = OPERATIONS[operation](hidden, weight, some_targets(), **options)
    assert head.bias is not None
    assert head.lora is not None
    trained = (hidden, head.weight, head.bias, head.lora.lora_A, head.lora.lora_B)
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("as_head", [KEYWORDS, ("bias", "softcap")], ids=["whole", "part"])
def test_a_head_gives_the_same_bits_as_its_fields(operation: str, as_head: tuple[str, ...]) -> None:
    found, expected = results(operation, as_head), results(operation, ())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("softcap", 3.0, "softcap: .* holds softcap=2.0, got 3.0"),
        ("logit_scale", 0.5, "logit_scale: .* holds logit_scale=0.7, got 0.5"),
        ("bias", torch.zeros(37), r"bias: .* holds bias=a tensor \(37,\), got a tensor \(37,\)"),
    ],
)
def test_a_keyword_beside_a_head_that_holds_it_is_refused(
    operation: str, keyword: str, value: object, message: str
) -> None:
    hidden, head = whole_head()
    with pytest.raises(ValueError, match=message):
        OPERATIONS[operation](hidden, head, some_targets(), **{keyword: value})


def test_a_shard_is_a_field_of_the_head() -> None:
    hidden, head = whole_head()
    shard = VocabularyShard(None, 0, 36, 37)
    with pytest.raises(ValueError, match=r"vocabulary_shard: .* holds shard=VocabularyShard"):
        linear_logprob(hidden, replace(head, shard=shard), some_targets(), vocabulary_shard=shard)


def test_linear_kl_takes_two_heads() -> None:
    hidden, head = whole_head()
    head = replace(head, lora=None)
    reference = replace(head, weight=head.weight.detach().roll(1, 0), bias=None)
    targets = some_targets()
    options = {"softcap": 2.0, "logit_scale": 0.7}
    expected = linear_kl(
        hidden, head.weight, hidden, reference.weight, targets, bias=head.bias, **options
    )
    for other in (reference, reference.weight):
        found = linear_kl(hidden, head, hidden, other, targets)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("policy", "reference", "message"),
    [
        ({}, {"softcap": 3.0}, r"reference_weight: .* \(2.0, 0.7\), got \(3.0, 0.7\)"),
        ({"lora": "its own"}, {}, "^weight: linear_kl expected a head without lora"),
        ({}, {"lora": "its own"}, "^reference_weight: linear_kl expected a head without lora"),
    ],
    ids=["softcap", "policy_lora", "reference_lora"],
)
def test_linear_kl_refuses_heads_that_it_does_not_read(
    policy: dict[str, Any], reference: dict[str, Any], message: str
) -> None:
    hidden, head = whole_head()
    plain = replace(head, lora=None)
    ours, theirs = (
        replace(plain, **({"lora": head.lora} if "lora" in changed else changed))
        for changed in (policy, reference)
    )
    with pytest.raises(ValueError, match=message):
        linear_kl(hidden, ours, hidden, theirs, some_targets())
