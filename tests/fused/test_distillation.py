"""A head's divergence from a teacher beside its cross-entropy: plain torch, and memory."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import LoraWeights
from fastalign.fused.cross_entropy import CrossEntropy
from fastalign.fused.distillation import Divergence, Divisors, TeacherRows, head_distillation
from fastalign.fused.metrics import metric_means
from fastalign.ops import LinearHead
from fastalign.ops.head.arguments import HeadOptions
from fastalign.ops.head.fused_linear_loss.two_heads import tile_bytes, tile_rows
from tests.tolerance import assert_no_worse

ROWS, DIM, TEACHERS_DIM, VOCABULARY = 23, 6, 5, 40
DIVISORS = Divisors(31.0, 17.0)
PLAIN = CrossEntropy()


def leaves(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "hidden": (rows, DIM),
        "weight": (VOCABULARY, DIM),
        "bias": (VOCABULARY,),
        "lora_A": (2, DIM),
        "lora_B": (VOCABULARY, 2),
    }
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def teacher_rows(dtype: torch.dtype, columns: int = VOCABULARY, rows: int = ROWS) -> TeacherRows:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, TEACHERS_DIM), (columns, TEACHERS_DIM))
    )
    return TeacherRows(hidden, LinearHead(weight, softcap=2.5))


def some_targets(rows: int = ROWS) -> Tensor:
    return torch.randint(0, 37, (rows,), generator=torch.Generator().manual_seed(7))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def explicit_jsd(logits: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """The definition of the paper, of probabilities."""
    num = min(logits.shape[-1], teacher.shape[-1])
    p, q = ((each[:, :num] / divergence.temperature).softmax(-1) for each in (logits, teacher))
    beta = divergence.beta
    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def explicit(
    logits: Tensor, teacher: Tensor, targets: Tensor, terms: CrossEntropy, divergence: Divergence
) -> Tensor:
    jsd = explicit_jsd(logits, teacher, divergence).sum() / DIVISORS.divergence
    smoothing, weights = terms.label_smoothing, terms.class_weight
    likelihood = F.cross_entropy(
        logits, targets, weights, reduction="sum", label_smoothing=smoothing
    )
    likelihood = likelihood + terms.z_coefficient * logits.logsumexp(-1).square().sum()
    weight = divergence.weight
    return weight * jsd + (1 - weight) * likelihood / DIVISORS.cross_entropy


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_values_and_gradients_are_those_of_float64(beta: float, weight: float) -> None:
    terms = CrossEntropy(0.1, 0.2, torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64))
    terms = PLAIN if weight == 1 else terms
    targets = some_targets()
    # Fewer and more of the teacher's tokens; all rows in a tile, and several tiles of a few.
    for temperature, columns, budget in product((1.0, 1.7), (37, 40, 43), (None, 20_000)):
        own, teacher = leaves(torch.float64), teacher_rows(torch.float64, columns)
        lora = LoraWeights(own["lora_A"], own["lora_B"], 0.5)
        head = LinearHead(own["weight"], own["bias"], 3.0, 1.3, lora)
        divergence = Divergence(weight, beta, temperature)
        loss, sums = head_distillation(
            own["hidden"],
            head,
            teacher,
            targets,
            HeadOptions(max_buffer_bytes=budget),
            terms,
            divergence,
            DIVISORS,
        )
        ours = torch.autograd.grad(2 * loss, own.values())
        logits, its = head.logits(own["hidden"]), teacher.head.logits(teacher.hidden)
        expected = explicit(logits, its, targets, terms, divergence)
        torch.testing.assert_close(loss, expected)
        theirs = torch.autograd.grad(2 * expected, own.values(), retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        means = metric_means(sums)
        assert means["num_target_tokens"] == ROWS
        torch.testing.assert_close(means["jsd"], explicit_jsd(logits, its, divergence).mean())
        torch.testing.assert_close(means["cross_entropy"], F.cross_entropy(logits, targets))
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(means["entropy"], -(log_p.exp() * log_p).sum(-1).mean())
        accuracy = (logits.argmax(-1) == targets).double().mean()
        torch.testing.assert_close(means["mean_token_accuracy"], accuracy)


def test_a_small_budget_makes_several_tiles() -> None:
    rows = tile_rows(ROWS, 43, torch.float64, "cpu", 20_000)
    assert 8 < rows < ROWS
    assert tile_bytes(rows, 43, torch.float64, "cpu") <= 20_000
    assert tile_bytes(rows + 1, 43, torch.float64, "cpu") > 20_000


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "bias", "lora_B"), ()])
def test_each_gradient_is_computed_where_it_is_wanted(trained: tuple[str, ...]) -> None:
    own, teacher, targets = leaves(torch.float64), teacher_rows(torch.float64), some_targets()
    for name, value in own.items():
        value.requires_grad_(name in trained)
    lora = LoraWeights(own["lora_A"], own["lora_B"])
    head, divergence = LinearHead(own["weight"], own["bias"], lora=lora), Divergence(0.6, 0.5, 1.0)
    loss, _ = head_distillation(
        own["hidden"], head, teacher, targets, HeadOptions(), PLAIN, divergence, DIVISORS
    )
    expected = explicit(
        head.logits(own["hidden"]), teacher.head.logits(teacher.hidden), targets, PLAIN, divergence
    )
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()  # type: ignore[no-untyped-call]
        theirs = torch.autograd.grad(expected, [own[name] for name in trained])
        for name, gradient in zip(trained, theirs, strict=True):
            torch.testing.assert_close(own[name].grad, gradient)
    assert [name for name, value in own.items() if value.grad is not None] == list(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_worse_than_eager_torch(dtype: torch.dtype) -> None:
    """Master weights in float32 beside hidden states of bfloat16, as a run has them."""
    divergence, targets = Divergence(0.7, 0.4, 1.0), some_targets()
    own = {name: value.detach() for name, value in leaves(dtype).items()}
    teacher = teacher_rows(dtype)
    hidden, weight = own["hidden"].requires_grad_(), own["weight"].float().requires_grad_()
    options = HeadOptions(compute_dtype=dtype)
    head = LinearHead(weight)
    loss, _ = head_distillation(
        hidden, head, teacher, targets, options, PLAIN, divergence, DIVISORS
    )
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    def plain(to: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [value.detach().to(to).requires_grad_() for value in (hidden, weight)]
        its = F.linear(teacher.hidden.to(to), teacher.head.weight.to(to))
        its = 2.5 * torch.tanh(its / 2.5)
        wide = torch.float64 if to == torch.float64 else torch.float32
        logits = F.linear(*inputs).to(wide)
        value = explicit(logits, its.to(wide), targets, PLAIN, divergence)
        return (value.detach(), *torch.autograd.grad(value, inputs))

    names = ("loss", "hidden", "weight")
    for name, ours, eager, truth in zip(
        names, found, plain(dtype), plain(torch.float64), strict=True
    ):
        kind = torch.float32 if name == "loss" else dtype
        assert_no_worse(name, ours, eager, truth, dtype=kind, length=VOCABULARY, scale=10.0)


def test_a_tile_takes_the_memory_that_is_counted() -> None:
    """Allocations of a call, of which the gradients' sums are no part."""
    from torch.distributed._tools.mem_tracker import MemTracker

    rows, columns, budget = 512, 4_000, 16 * 2**20
    generator = torch.Generator().manual_seed(0)
    made: list[Any] = [
        torch.randn(shape, generator=generator) for shape in ((rows, 4), (columns, 4)) * 2
    ]
    targets = torch.zeros(rows, dtype=torch.int64)
    hidden = made[0].requires_grad_()  # the weight is frozen: its gradient is no tile
    tracker = MemTracker()
    with tracker:
        head_distillation(
            hidden,
            LinearHead(made[1]),
            TeacherRows(made[2], LinearHead(made[3])),
            targets,
            HeadOptions(max_buffer_bytes=budget),
            PLAIN,
            Divergence(0.5, 0.3, 1.3),
            DIVISORS,
        )
    (kinds,) = tracker.get_tracker_snapshot("peak").values()
    peak = kinds["Total"]
    assert 0.4 * budget < peak <= budget


def test_no_rows_and_what_is_wrong() -> None:
    own, teacher = leaves(torch.float32, 0), teacher_rows(torch.float32, rows=0)
    head, targets = LinearHead(own["weight"]), some_targets(0)
    arguments: Any = (HeadOptions(), PLAIN, Divergence(), DIVISORS)
    loss, sums = head_distillation(own["hidden"], head, teacher, targets, *arguments)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert not sums
    assert own["weight"].grad is not None
    assert not own["weight"].grad.any()
    own = leaves(torch.float32)
    with pytest.raises(ValueError, match=r"targets: expected int64 \(0,\)"):
        head_distillation(own["hidden"], head, teacher, some_targets(), *arguments)
