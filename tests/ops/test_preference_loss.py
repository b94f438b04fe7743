"""`preference_loss`: every formula on every backend against float64, values and gradients."""

import math

import pytest
import torch
from torch import Tensor

from fastalign import losses
from fastalign.ops import preference_loss
from fastalign.ops.backends import unusable_reason
from fastalign.ops.preference_loss.op import preference_loss_forward
from tests.losses.test_preference_losses import GOLDEN, TIES
from tests.ops.preference_loss_cases import (
    ALL_BOUNDS,
    FORMULAS,
    WITH_TIES,
    Pairs,
    eager,
    inputs,
    make,
    run,
)
from tests.tolerance import assert_no_worse

NATIVE = unusable_reason("native", "cpu", torch.float32)
KERNELS = ["triton", *([] if NATIVE else ["native"])]
CASES = [(name, False) for name in FORMULAS] + [(name, True) for name in WITH_TIES]


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("name", "ties"), CASES)
@pytest.mark.parametrize("bounds", ALL_BOUNDS)
def test_values_and_gradients_are_no_worse_than_eager(
    backend: str, name: str, ties: bool, bounds: str
) -> None:
    pairs = inputs(name, ALL_BOUNDS[bounds], ties)
    found = run(name, pairs, backend)
    plain, truth = eager(name, pairs, torch.float32), eager(name, pairs, torch.float64)
    for what, ours, theirs, true in zip(
        ("losses", "sequence_logprob", "gradient"), found, plain, truth, strict=True
    ):
        assert ours.dtype == torch.float32
        if (name, bounds) == ("orpo", "empty"):
            # Of nothing the odds are infinite; the definition bounds them by the dtype's eps.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            continue
        assert_no_worse(what, ours, theirs, true, dtype=torch.float32, length=1, scale=1.0)


@pytest.mark.parametrize(("name", "ties"), CASES)
def test_float64_is_the_references_and_exact(name: str, ties: bool) -> None:
    pairs = inputs(name, ALL_BOUNDS["uneven"], ties)
    truth = eager(name, pairs, torch.float64)
    wide = Pairs(pairs.logprob.double(), pairs.bounds, pairs.reference_logprob, pairs.tie)
    for ours, true in zip(run(name, wide, "auto"), truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


KERNEL_GOLDEN = [
    (name, options, expected)
    for name, options, expected in GOLDEN
    if losses.formula(getattr(losses, name), **options).kernel is not None
]
GOLDEN_TIES = [
    (name, {"beta": 0.1, "nu": nu}, value, tie)
    for name, nu, *values in TIES
    for value, tie in zip(values, (False, True), strict=True)
]


@pytest.mark.parametrize(
    ("name", "options", "expected", "tie"), [*((*g, None) for g in KERNEL_GOLDEN), *GOLDEN_TIES]
)
def test_hand_worked_numbers(
    backend: str, name: str, options: dict[str, float], expected: float, tie: bool | None
) -> None:
    formula = losses.formula(getattr(losses, name), **options)
    found, sequence_logprob = preference_loss(
        torch.tensor([-2.0] * 5 + [-3.0] * 4),
        torch.tensor([0, 5, 9]),
        formula,
        torch.tensor([-11.0, -11.5]) if formula.needs_reference else None,
        tie=None if tie is None else torch.tensor([tie]),
        backend=backend,  # type: ignore[arg-type]
    )
    assert sequence_logprob.tolist() == [-10.0, -12.0]
    assert found.tolist() == pytest.approx([expected], rel=3e-7)


FAR = [1e4, -1e4, 300.0, -300.0, 40.0, -40.0, 0.0]


@pytest.mark.parametrize(("name", "ties"), CASES)
def test_extreme_margins(backend: str, name: str, ties: bool) -> None:
    # One token each: a margin of d = beta * h from the chosen, or -d from the rejected.
    beta = FORMULAS[name]["beta"]
    chosen, rejected = torch.tensor([[min(x / beta, 0.0), min(-x / beta, 0.0)] for x in FAR]).T
    logprob = torch.stack([chosen, rejected], dim=1).flatten()
    reference = torch.zeros_like(logprob) if make(name).needs_reference else None
    tie = torch.ones(len(FAR), dtype=torch.bool) if ties else None
    pairs = Pairs(logprob, torch.arange(len(logprob) + 1), reference, tie)
    found = run(name, pairs, backend)
    # ORPO's bound on a certain token's odds is its dtype's eps.
    truth = eager(name, pairs, torch.float32 if name == "orpo" else torch.float64)
    for ours, true in zip(found, truth, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), true.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "ties"), CASES)
def test_a_banned_token_is_as_in_the_definition_and_a_nan_stays_in_its_pair(
    backend: str, name: str, ties: bool
) -> None:
    pairs = inputs(name, [0, 2, 4, 6, 8, 10, 12, 14, 16], ties)
    pairs.logprob[0], pairs.logprob[6], pairs.logprob[9] = -torch.inf, -torch.inf, torch.nan
    found, truth = run(name, pairs, backend), eager(name, pairs, torch.float64)
    assert found[0].isnan().tolist()[2:] == [True, False]
    assert found[2].isnan().tolist()[12:] == [False] * 4
    # By the definition in PyTorch inf - inf makes some NaN; the kernels may know better.
    for ours, true in zip(found, truth, strict=True):
        known = ~true.isnan()
        known.reshape(4, -1)[2] = False
        torch.testing.assert_close(ours[known].double(), true[known], rtol=1e-6, atol=1e-6)


def test_a_long_sequence_is_right_to_a_thousandth_of_a_nat(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = inputs("dpo", [0, 4096, 8192])
    logprob = -7.9 - 0.1 * torch.rand(8192, generator=generator)
    _, found, _ = run("dpo", Pairs(logprob, pairs.bounds, torch.zeros(2), None), backend)
    true = logprob.double().reshape(2, 4096).sum(1)
    assert (found.double() - true).abs().max() < 1e-3


def test_a_policy_that_is_its_reference_loses_exactly_ln_2(backend: str) -> None:
    pairs = inputs("dpo", ALL_BOUNDS["uneven"])
    _, own, _ = run("dpo", pairs, backend)
    found, _, _ = run("dpo", Pairs(pairs.logprob, pairs.bounds, own, None), backend)
    assert found.tolist() == [torch.tensor(math.log(2)).item()] * 4


@pytest.mark.parametrize("name", ["simpo", "ipo_mean", "dpo_length_penalised", "orpo"])
def test_rows_that_do_not_count(backend: str, name: str) -> None:
    few = inputs(name, [0, 3, 7, 9, 14])
    logprob = torch.zeros(21)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 10, 11, 13, 14, 16, 17, 19])
    logprob[kept] = few.logprob
    padded = Pairs(logprob, torch.tensor([0, 4, 9, 13, 21]), few.reference_logprob, None)
    found, expected = run(name, padded, backend, few.bounds.diff()), run(name, few, backend)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2][kept], expected[2])
    assert not torch.equal(run(name, padded, backend)[0], expected[0])


@pytest.mark.parametrize("name", FORMULAS)
def test_pairs_may_be_permuted(backend: str, name: str) -> None:
    pairs = inputs(name, [0, 3, 10, 14, 20], name in WITH_TIES)
    first, second = pairs.logprob[:10], pairs.logprob[10:]
    reference, tie = pairs.reference_logprob, pairs.tie
    swapped = Pairs(
        torch.cat([second, first]),
        torch.tensor([0, 4, 10, 13, 20]),
        None if reference is None else reference.roll(2),
        None if tie is None else tie.flip(0),
    )
    assert torch.equal(run(name, pairs, backend)[0], run(name, swapped, backend)[0].flip(0))


def test_inputs_may_be_strided_and_of_other_dtypes(backend: str) -> None:
    pairs = inputs("dpo_davidson", ALL_BOUNDS["uneven"], ties=True)
    assert pairs.reference_logprob is not None
    assert pairs.tie is not None
    odd = Pairs(
        torch.stack([pairs.logprob, pairs.logprob], dim=1)[:, 0],
        torch.stack([pairs.bounds, pairs.bounds], dim=1)[:, 0].int(),
        pairs.reference_logprob.double().repeat_interleave(2)[::2],
        pairs.tie.repeat_interleave(2)[::2],
    )
    plain, found = run("dpo_davidson", pairs, backend), run("dpo_davidson", odd, backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_uninitialised_memory_is_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = inputs("simpo", ALL_BOUNDS["uneven"])
    before = run("simpo", pairs, backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(torch.nan))
    after = run("simpo", pairs, backend)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["dpo", "simpo", "dpo_davidson"])
def test_the_chosen_responses_cross_entropy_is_added_to_any_loss(backend: str, name: str) -> None:
    pairs = inputs(name, [0, 3, 10, 27, 30, 31, 40], name in WITH_TIES)
    made = losses.formula(getattr(losses, name), **FORMULAS[name], nll_coefficient=0.5)
    assert made.has_nll
    assert not make(name).has_nll
    length = torch.tensor([2, 7, 16, 3, 1, 9])  # not all rows count
    leaf = pairs.logprob.clone().requires_grad_()
    found, _ = preference_loss(
        leaf,
        pairs.bounds,
        made,
        pairs.reference_logprob,
        length=length,
        tie=pairs.tie,
        backend=backend,  # type: ignore[arg-type]
    )
    plain = pairs.logprob.clone().requires_grad_()
    expected, sums = preference_loss(
        plain,
        pairs.bounds,
        make(name),
        pairs.reference_logprob,
        length=length,
        tie=pairs.tie,
        backend=backend,  # type: ignore[arg-type]
    )
    # A tie has no chosen response.
    counts = torch.ones(3) if pairs.tie is None else (~pairs.tie).float()
    expected = expected - 0.5 * sums[0::2] / length[0::2] * counts
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), plain)[0])


@pytest.mark.parametrize("part", [0, 1])
def test_each_gradient_alone(backend: str, part: int) -> None:
    pairs = inputs("dpo", ALL_BOUNDS["uneven"])
    leaf = pairs.logprob.clone().requires_grad_()
    found = preference_loss(
        leaf,
        pairs.bounds,
        make("dpo"),
        pairs.reference_logprob,
        backend=backend,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(found[part].sum(), leaf)
    if part == 1:
        assert gradient.eq(1).all()
        return
    chosen, rejected = (found[1] - pairs.reference_logprob).reshape(-1, 2).T.detach()
    pull = 0.3 * torch.sigmoid(-0.3 * (chosen - rejected))
    expected = torch.stack([-pull, pull], dim=1).flatten()
    expected = expected.repeat_interleave(pairs.bounds.diff())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("name", "ties"), CASES)
def test_reference_gradients_by_finite_differences(name: str, ties: bool) -> None:
    pairs = inputs(name, [0, 2, 5, 6, 9], ties)

    def both(logprob: Tensor) -> tuple[Tensor, Tensor]:
        return preference_loss(
            logprob, pairs.bounds, make(name), pairs.reference_logprob, tie=pairs.tie
        )

    assert torch.autograd.gradcheck(both, pairs.logprob.double().requires_grad_())


@pytest.mark.parametrize("name", KERNELS)
def test_the_registration_passes_opcheck(name: str) -> None:
    pairs = inputs("dpo_rao_kupper", [0, 2, 5, 6, 9], ties=True)
    kernel, logprob = make("dpo_rao_kupper").kernel, pairs.logprob.requires_grad_()
    arguments = (logprob, pairs.bounds, pairs.reference_logprob, None, pairs.tie)
    rest = (int(kernel.link), kernel.per_token, kernel.numbers(), name)
    torch.library.opcheck(preference_loss_forward, (*arguments, *rest))


@pytest.mark.parametrize("name", ["reference", *([] if NATIVE else ["native"])])
def test_compiled_whole(name: str) -> None:
    pairs, formula = inputs("dpo", ALL_BOUNDS["uneven"]), make("dpo")

    def loss(x: Tensor) -> Tensor:
        reference = pairs.reference_logprob
        return preference_loss(x, pairs.bounds, formula, reference, backend=name)[0].sum()  # type: ignore[arg-type]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, through = (pairs.logprob.clone().requires_grad_() for _ in range(2))
    loss(plain).backward()
    compiled(through).backward()
    torch.testing.assert_close(plain.grad, through.grad)
