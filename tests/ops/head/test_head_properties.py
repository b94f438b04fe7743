"""What holds for the log-probs and entropies of any head, whoever computes them."""

import math

import pytest
import torch
from torch import Tensor

from fastalign import LinearHead, fused_linear_ppo_loss
from fastalign.ops import linear_kl, linear_logprob, token_logprob
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.head_tile import HeadTransform, Tile, read_tile

ROWS, WIDTH = 13, 8
VOCABULARIES = [1, 2, 63, 1000, 5003]
FAR = 2**30  # elements between two rows: the third begins beyond what 32 bits can count


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = unusable_reason(request.param, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def head(vocabulary: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight whose logits have the standard deviation `scale`, and targets."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator) * scale / math.sqrt(WIDTH)
    return hidden, weight, torch.randint(vocabulary, (ROWS,), generator=generator)


def both(
    hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, bias: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropies by `linear_logprob` and by `token_logprob`."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return [
        linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, backend=backend),
        token_logprob(logits, targets, return_entropy=True, backend=backend),
    ]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 100.0, 1e4])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_log_prob_is_positive_and_entropy_is_within_its_bounds(
    backend: str, vocabulary: int, scale: float
) -> None:
    hidden, weight, targets = head(vocabulary, scale)
    targets[::2] = (hidden @ weight.t()).argmax(-1)[::2]
    for logprob, entropy in both(hidden, weight, targets, backend):
        rounding = 1e-6 * math.log(2 * vocabulary)
        assert (logprob <= rounding).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(vocabulary) + rounding).all()


@pytest.mark.parametrize("shift", [-300.0, 7.5])
def test_a_constant_added_to_every_logit_changes_nothing(backend: str, shift: float) -> None:
    hidden, weight, targets = head(1000)
    bias = torch.linspace(-1, 1, 1000)
    for found, expected in zip(
        both(hidden, weight, targets, backend, bias + shift),
        both(hidden, weight, targets, backend, bias),
        strict=True,
    ):
        # the shifted logits themselves are rounded to float32
        rounding = 4 * abs(shift) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding + 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_large_constant_added_to_every_logit_costs_no_precision(
    backend: str, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(3)

    def quarters(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator) / 4

    sides = [(quarters(ROWS, WIDTH), 2 * quarters(1000, WIDTH)) for _ in range(2)]
    targets = torch.randint(1000, (ROWS,), generator=generator)

    def results(shift: float) -> list[Tensor]:
        leaves = [side.requires_grad_() for side in sides[0]]
        bias = torch.full((1000,), shift)  # at which quarters are still exact
        policy, reference = ((h, LinearHead(w, bias)) for h, w in (leaves, sides[1]))
        options = {"temperature": temperature, "backend": backend}
        old, advantage = -torch.ones(ROWS), torch.ones(ROWS)
        loss, _ = fused_linear_ppo_loss(*policy, targets, old, advantage, **options)
        found = [
            *linear_logprob(*policy, targets, return_entropy=True, **options),
            *linear_kl(*policy, *reference, targets, **options),
            loss,
        ]
        upstream = [torch.linspace(-1, 1, ROWS).expand_as(value) for value in found[:-1]]
        upstream.append(torch.tensor(1.0))
        pairs = zip(found, upstream, strict=True)
        total = sum((value * by).sum() for value, by in pairs if value.requires_grad)
        return [*found, *torch.autograd.grad(total, leaves)]

    for found, expected in zip(results(2.0**14), results(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=4e-6)


def test_the_order_of_tokens_and_of_rows_does_not_matter(backend: str) -> None:
    hidden, weight, targets = head(1000)
    tokens = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    place = tokens.argsort()  # where a token went
    for found, expected in zip(
        both(hidden[rows], weight[tokens], place[targets[rows]], backend),
        both(hidden, weight, targets, backend),
        strict=True,
    ):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[rows], rtol=1e-5, atol=1e-5)


def test_logits_that_are_all_very_negative(backend: str) -> None:
    hidden, weight, targets = head(1000)
    bias = torch.full((1000,), -1e6)
    for logprob, entropy in both(hidden, weight, targets, backend, bias):
        assert logprob.isfinite().all()
        assert (logprob < -1).all()
        assert ((entropy > 1) & (entropy < math.log(1000))).all()


def test_one_dominant_logit(backend: str) -> None:
    hidden, weight, _ = head(1000)
    bias = torch.zeros(1000)
    bias[17] = 1e4
    for target, logprob_is in ((17, 0.0), (3, -1e4)):
        targets = torch.full((ROWS,), target)
        for logprob, entropy in both(hidden, weight, targets, backend, bias):
            torch.testing.assert_close(
                logprob, torch.full_like(logprob, logprob_is), rtol=0, atol=40.0 * (target != 17)
            )
            assert not entropy.any()


def test_a_vocabulary_of_250_thousand(backend: str) -> None:
    hidden, weight, targets = head(250_002)
    hidden, targets = hidden[:3], targets[:3]
    targets[0] = 250_001
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0]
    of_sums = 1e-4 if backend == "reference" else 2e-5  # eager adds up 250,002 terms in float32
    for logprob, entropy in both(hidden, weight, targets, backend):
        torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=of_sums
        )


@pytest.mark.parametrize("name", ["torch", "native", "triton"])
def test_a_tile_with_more_elements_than_32_bits_can_count(name: str) -> None:
    if name != "torch" and unusable_reason(name, "cpu", torch.float32) is not None:
        pytest.skip(str(unusable_reason(name, "cpu", torch.float32)))
    # Memory that nobody touches is not there: three rows of 45 are.
    tile = torch.empty(2 * FAR + 64).as_strided((3, 45), (FAR, 1))
    targets, ignored = torch.tensor([1, 44, 7]), torch.zeros(3, dtype=torch.bool)
    tile.copy_(torch.randn(3, 45, generator=torch.Generator().manual_seed(0)))
    expected = tile.clone()
    scratch, rest = tile.new_empty(2, 1, 45), (targets, ignored, HeadTransform())
    near = read_tile(Tile(expected, *rest), name, scratch, gradient=expected)
    far = read_tile(Tile(tile, *rest), name, scratch, gradient=tile)
    assert torch.equal(tile, expected)
    assert torch.equal(far.logprob, near.logprob)


def test_logits_with_more_elements_than_32_bits_can_count(backend: str) -> None:
    logits = torch.empty(2 * FAR + 64).as_strided((3, 45), (FAR, 1))
    logits.copy_(torch.randn(3, 45, generator=torch.Generator().manual_seed(0)))
    targets = torch.tensor([1, 44, 7])
    near = token_logprob(logits.contiguous(), targets, backend=backend)
    assert torch.equal(token_logprob(logits, targets, backend=backend), near)
