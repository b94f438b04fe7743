"""`kl_penalty`: every backend against the docstring's lines in float64, values and gradients."""

import math

import pytest
import torch
from torch import Tensor

from fastalign.ops import KLPenalty, kl_penalty
from fastalign.ops.kl_penalty import triton_kernels
from fastalign.ops.kl_penalty.op import kl_penalty_forward
from tests.ops.kl_penalty_cases import ESTIMATORS, Inputs, inputs, run
from tests.ops.packed_cases import (
    BACKENDS,
    LENGTHS,
    bounds_of,
    order_of,
    poison_new_tensors,
    require,
)
from tests.tolerance import assert_no_worse


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    require(request.param)
    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 32)  # so that a block follows another
    return request.param


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients(
    backend: str, lengths: list[int], estimator: str, everything: bool
) -> None:
    given = inputs(lengths, everything=everything)
    found = run(given, estimator, backend)
    eager = run(given, estimator, None)
    truth = run(given.to(torch.float64), estimator, None)
    for name, true in truth.items():
        assert_no_worse(
            name,
            found[name],
            eager[name],
            true,
            dtype=torch.float32,
            length=max(lengths, default=1) if name == "sequence_kl" else 1,
            scale=3.0,
        )


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 0.3), ("k2", 0.045), ("k3", 0.0408182207)])
def test_by_hand(backend: str, estimator: str, kl: float) -> None:
    found = kl_penalty(
        torch.tensor([-1.0, -2.0, -0.7]),
        torch.tensor([-1.3, -2.3, -1.0]),
        torch.tensor([0, 2, 3]),
        torch.tensor([1.0, -2.0]),
        coefficient=0.5,
        estimator=estimator,
        backend=backend,
    )
    torch.testing.assert_close(found.kl, torch.full((3,), kl), rtol=2e-6, atol=0)
    torch.testing.assert_close(found.sequence_kl, torch.tensor([2 * kl, kl]), rtol=2e-6, atol=0)
    expected = torch.tensor([-kl / 2, 1 - kl / 2, -2 - kl / 2])
    torch.testing.assert_close(found.reward, expected, rtol=0, atol=3e-7)


def test_k3_near_zero(backend: str) -> None:
    log_ratio = torch.tensor([0.0, 2**-20, -(2**-14), 2**-9, -(2**-5), 0.4, -0.4, 0.6, -0.6])
    arguments = (log_ratio, torch.zeros(9), torch.tensor([0, 9]))
    found = kl_penalty(*arguments, coefficient=1.0, estimator="k3", backend=backend).kl
    truth = torch.expm1(-log_ratio.double()) + log_ratio.double()
    assert bool((found >= 0).all())
    # What expm1 leaves is rounding of x; series leave that of x^2 / 2.
    size = log_ratio.abs() if backend == "reference" else truth
    assert bool(((found - truth).abs() <= 8 * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # interpreter's
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_log_ratios(backend: str, estimator: str) -> None:
    logprob = torch.tensor([-1e4, -0.5, -100.0, -1.0, -torch.inf])
    reference_logprob = torch.tensor([-1.0, -1e4, -3.0, -torch.inf, -1.0])
    bounds = torch.arange(6)
    given = Inputs(logprob, reference_logprob, bounds, None, 0.1, None)
    for name, true in run(given, estimator, None).items():
        ours = run(given, estimator, backend)[name]
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=0, equal_nan=True)


def test_k3_is_bounded_with_no_gradient_where_it_is(backend: str) -> None:
    logprob = torch.tensor([-100.0, -4.0, -0.7, -1.0, -30.0]).requires_grad_()
    reference_logprob = torch.tensor([0.0, -1.0, -0.9, -31.0, -3e4])
    arguments = {"coefficient": 0.05, "estimator": "k3", "backend": backend}
    bounds = torch.tensor([0, 2, 5])
    found = kl_penalty(logprob, reference_logprob, bounds, **arguments)
    small = math.expm1(-0.2) + 0.2
    torch.testing.assert_close(found.kl, torch.tensor([10.0, 10.0, small, 10.0, 10.0]))
    torch.testing.assert_close(found.reward, -0.05 * found.kl.detach())
    (gradient,) = torch.autograd.grad(found.kl.sum(), logprob)
    slope = torch.tensor([0.0, 0.0, -math.expm1(-0.2), 0.0, 0.0])
    torch.testing.assert_close(gradient, slope)
    wider = kl_penalty(logprob, reference_logprob, bounds, max_k3=25.0, **arguments).kl
    expected = torch.tensor([25.0, math.expm1(3.0) - 3, small, 25.0, 25.0])
    torch.testing.assert_close(wider, expected)
    assert torch.equal(wider[2], found.kl[2])
    with pytest.raises(ValueError, match="max_k3: expected a positive number, got -1"):
        kl_penalty(logprob, reference_logprob, bounds, max_k3=-1.0, **arguments)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_masked_may_hold_anything(backend: str, estimator: str) -> None:
    given = inputs([6, 70])
    assert given.mask is not None
    expected = run(given, estimator, backend)
    for value in (torch.nan, -torch.inf, -1e30):
        filled = given.logprob.masked_fill(~given.mask, value)
        found = run(Inputs(**{**vars(given), "logprob": filled}), estimator, backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not expected["gradient"][~given.mask].any()
    assert not expected["reward"][~given.mask].any()


def test_a_long_responses_sum_is_rounded_once(backend: str) -> None:
    length = 700 if backend == "triton" else 100_000
    given = inputs([length], everything=False)
    found = run(given, "k2", backend)
    total = (given.logprob.double() - given.reference_logprob.double()).square().sum() / 2
    assert abs(float(found["sequence_kl"][0]) / float(total) - 1) < 1e-7


def test_the_order_of_responses_is_of_no_consequence(backend: str) -> None:
    lengths = [3, 50, 7]
    given = inputs(lengths)
    reversed_lengths, order = order_of(lengths)
    other = Inputs(
        given.logprob[order],
        given.reference_logprob[order],
        bounds_of(reversed_lengths),
        given.score.flip(0),  # type: ignore[union-attr]
        given.coefficient,
        given.mask[order],  # type: ignore[index]
    )
    first, second = (
        kl_penalty(**vars(each), estimator="k3", backend=backend) for each in (given, other)
    )
    assert torch.equal(first.reward[order], second.reward)
    assert torch.equal(first.kl[order], second.kl)
    torch.testing.assert_close(first.sequence_kl.flip(0), second.sequence_kl)


def test_tensors_may_be_strided_and_of_other_dtypes(backend: str) -> None:
    given = inputs([9, 40]).to(torch.bfloat16)
    expected = run(given.to(torch.float32), "k3", backend)
    strided = Inputs(
        *(
            torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value
            for value in vars(given).values()
        )
    )
    found = run(strided, "k3", backend)
    for name in ("reward", "kl", "sequence_kl"):
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found["gradient"], expected["gradient"].bfloat16())


def test_uninitialised_memory_is_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs([5, 40])
    before = run(given, "k3", backend)
    poison_new_tensors(monkeypatch)
    after = run(given, "k3", backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_each_gradient_alone(backend: str) -> None:
    given = inputs([4, 33])
    for part in ("kl", "sequence_kl"):
        gradients = []
        for name in (backend, "reference"):
            leaf = given.logprob.clone().requires_grad_()
            arguments = {**vars(given), "logprob": leaf}
            getattr(kl_penalty(**arguments, estimator="k2", backend=name), part).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_gradients_by_finite_differences(estimator: str) -> None:
    given = inputs([3, 4]).to(torch.float64)

    def differentiable(logprob: Tensor) -> tuple[Tensor, Tensor]:
        found = kl_penalty(**{**vars(given), "logprob": logprob}, estimator=estimator)
        return found.kl, found.sequence_kl

    assert torch.autograd.gradcheck(differentiable, given.logprob.requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
def test_the_registration_passes_opcheck(name: str) -> None:
    require(name)
    given = inputs([3, 4])
    leaf = given.logprob.requires_grad_()
    packed = (leaf, given.reference_logprob, given.bounds, given.score)
    torch.library.opcheck(
        kl_penalty_forward, (*packed, 0.0, given.coefficient, given.mask, "k3", 10.0, name)
    )


def test_compiled_whole() -> None:
    given = inputs([5, 12])

    def loss(logprob: Tensor) -> Tensor:
        arguments = {**vars(given), "logprob": logprob}
        found = kl_penalty(**arguments, estimator="k2", backend="reference")
        return (found.kl * found.reward).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain_leaf, through = (given.logprob.clone().requires_grad_() for _ in range(2))
    loss(plain_leaf).backward()
    compiled(through).backward()
    torch.testing.assert_close(plain_leaf.grad, through.grad)


def test_a_score_without_a_token_raises_or_is_seen(backend: str) -> None:
    logprob, bounds, score = torch.zeros(3), torch.tensor([0, 2, 2, 3]), torch.ones(3)
    arguments = {"reference_logprob": logprob, "coefficient": 0.1, "backend": backend}
    with pytest.raises(ValueError, match=r"score: expected every response.*got response 1 with"):
        kl_penalty(logprob, bounds=bounds, score=score, **arguments)
    mask = torch.tensor([True, True, False])
    with pytest.raises(ValueError, match=r"score: .*got response 1 with none"):
        kl_penalty(logprob, bounds=torch.tensor([0, 2, 3]), score=score[:2], mask=mask, **arguments)
    # Where values are not looked at first, as on a GPU.
    packed = (logprob, logprob, bounds, score)
    found = KLPenalty(*kl_penalty_forward(*packed, 0.1, None, None, "k1", 10.0, backend))
    assert found.sequence_kl.isnan().tolist() == [False, True, False]
    assert found.reward.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": torch.zeros(5, 2)}, r"logprob: expected floating \(N,\)"),
        ({"reference_logprob": torch.zeros(4)}, r"reference_logprob: expected floating \(5,\)"),
        ({"bounds": torch.tensor([0, 2, 4])}, r"bounds: expected to rise from 0 to 5, got 0\.\.4"),
        ({"score": torch.zeros(5)}, r"score: expected floating \(2,\), got torch.float32 \(5,\)"),
        ({"score": torch.zeros(2, device="meta")}, "score: expected on cpu as logprob is"),
        ({"mask": torch.ones(5)}, r"mask: expected bool \(5,\), got torch.float32 \(5,\)"),
        ({"mask": torch.ones(5, device="meta").bool()}, "mask: expected on cpu as logprob is"),
        ({"estimator": "k4"}, "estimator: expected one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"coefficient": -0.1}, "coefficient: expected a finite number that is not negative"),
        ({"coefficient": torch.tensor(torch.inf)}, "coefficient: expected a finite number"),
        ({"coefficient": torch.ones(1)}, r"coefficient: expected a number or a tensor \(\)"),
        ({"coefficient": torch.ones((), device="meta")}, "coefficient: expected on cpu as"),
        ({"backend": "numpy"}, "backend: expected one of 'auto'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "logprob": torch.zeros(5),
        "reference_logprob": torch.zeros(5),
        "bounds": torch.tensor([0, 2, 5]),
        "coefficient": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        kl_penalty(**arguments)  # type: ignore[arg-type]
