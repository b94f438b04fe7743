"""`token_kl`: every backend against float64, values and gradients."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops import native_library, token_kl
from fastalign.ops.backends import unusable_reason
from tests.tolerance import assert_no_worse

NATIVE = unusable_reason("native", "cpu", torch.float32)
ISAS = [] if NATIVE else native_library.cpu_isas()
BACKENDS = ["reference", "triton", *(f"native-{isa}" for isa in ISAS)]
DIRECTIONS = ["reverse", "forward"]
# of the policy and of the reference
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
]
SHAPES = [(1, 1), (3, 2), (5, 63), (3, 2000), (2, 9001), (0, 8)]
INFINITY = torch.inf


@dataclass(frozen=True)
class Case:
    direction: str = "reverse"
    softcap: float | None = None
    temperature: float | str = 1.0

    def arguments(self, num_rows: int) -> dict[str, Any]:
        temperature: object = self.temperature
        if temperature == "rows":
            temperature = torch.linspace(0.5, 2.0, num_rows)
        return {
            "direction": self.direction,
            "softcap": self.softcap,
            "temperature": temperature,
            "ignored": torch.arange(num_rows) == 1,
        }


CASES = [
    Case(direction, softcap, temperature)
    for direction in DIRECTIONS
    for softcap, temperature in ((None, 1.0), (None, 0.7), (5.0, "rows"))
]
# every case in float32, and every pair of dtypes with some case
COMBINATIONS = [(case, DTYPES[0]) for case in CASES]
COMBINATIONS += list(zip(CASES[1:], DTYPES[1:], strict=False))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FASTALIGN_CPU_ISA", isa)
    return name


def inputs(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], distance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A policy's logits, and those of a reference some distance away."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 4 * torch.randn(shape, generator=generator)
    reference = logits + distance * torch.randn(shape, generator=generator)
    return logits.to(dtypes[0]), reference.to(dtypes[1])


def run(logits: Tensor, reference: Tensor, backend: str, case: Case) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    kl = token_kl(leaf, reference, backend=backend, **case.arguments(len(leaf)))  # type: ignore[arg-type]
    (kl * torch.linspace(-1, 1, len(leaf), dtype=kl.dtype)).sum().backward()
    assert leaf.grad is not None
    return kl.detach(), leaf.grad


def eager(logits: Tensor, reference: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The lines in the docstring, differentiated by autograd."""
    leaf = logits.detach().requires_grad_()
    arguments = case.arguments(len(leaf))
    log_probs = []
    for side in (leaf, reference):
        z = side if side.dtype == torch.float64 else side.float()
        if case.softcap is not None:
            z = case.softcap * torch.tanh(z / case.softcap)
        temperature = arguments["temperature"]
        if isinstance(temperature, Tensor):
            temperature = temperature.to(z.dtype)[:, None]
        log_probs.append((z / temperature).log_softmax(-1))
    own, other = log_probs if case.direction == "reverse" else reversed(log_probs)
    kl = (own.exp() * (own - other)).sum(-1).masked_fill(arguments["ignored"], 0.0)
    (kl * torch.linspace(-1, 1, len(leaf), dtype=kl.dtype)).sum().backward()
    assert leaf.grad is not None
    return kl.detach(), leaf.grad


@pytest.mark.parametrize(("case", "dtypes"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], case: Case
) -> None:
    logits, reference = inputs(shape, dtypes)
    found = run(logits, reference, backend, case)
    plain = eager(logits, reference, case)
    truth = eager(logits.double(), reference.double(), case)
    for name, ours, theirs, true in zip(("kl", "gradient"), found, plain, truth, strict=True):
        rounded = dtypes[0] if name == "gradient" else torch.float32
        assert_no_worse(name, ours, theirs, true, dtype=rounded, length=shape[1], scale=20.0)


def test_float64_on_either_side_is_the_references_and_exact() -> None:
    logits, reference = inputs((6, 31), (torch.float32, torch.float32))
    true = eager(logits.double(), reference.double(), CASES[2])
    kl, gradient = run(logits.double(), reference.double(), "auto", CASES[2])
    torch.testing.assert_close(kl, true[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, true[1], rtol=1e-12, atol=1e-12)
    for first, second in ((logits.double(), reference), (logits, reference.double())):
        kl, gradient = run(first, second, "auto", CASES[2])
        torch.testing.assert_close(kl, true[0], rtol=1e-12, atol=1e-12)
        assert gradient.dtype == first.dtype
        with pytest.raises(ValueError, match="float32; backend='reference'"):
            token_kl(first, second, backend="triton")


def test_a_hand_worked_number(backend: str) -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): the two KLs differ
    logits = torch.zeros(1, 2)
    reference = torch.tensor([[0.25, 0.75]]).log() + 7.0
    for direction, expected in (("reverse", 0.14384104), ("forward", 0.13081204)):
        kl = token_kl(logits, reference, direction=direction, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(kl, torch.tensor([expected]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_sides_have_no_kl_and_no_gradient(backend: str, case: Case) -> None:
    logits, _ = inputs((9, 507), (torch.float32, torch.float32))
    kl, gradient = run(logits, logits.clone(), backend, case)
    assert not kl.any()
    assert not gradient.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_never_negative_and_blind_to_a_shift(backend: str, direction: str) -> None:
    logits, reference = inputs((50, 40), (torch.float32, torch.float32), distance=1e-4)
    kl = token_kl(logits, reference, direction=direction, backend=backend)  # type: ignore[arg-type]
    assert (kl >= 0).all()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    other = token_kl(
        logits[:, order] + 3.0,
        reference[:, order] - 5.0,
        direction=direction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(kl, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ban", [-INFINITY, torch.finfo(torch.float32).min])
def test_banned_tokens(backend: str, ban: float) -> None:
    logits, reference = inputs((4, 9001), (torch.float32, torch.float32))
    logits[0, :5000], reference[0, :5000] = ban, ban  # by both
    logits[1, 3] = ban
    reference[2, 8999] = ban
    logits[3, :8998], reference[3, :8999] = ban, ban
    clean = slice(5000, None)
    for case, infinite in (
        (Case("reverse"), [False, False, True, True]),
        (Case("forward"), [False, True, False, False]),
    ):
        arguments = {**case.arguments(4), "ignored": None}
        leaf = logits.clone().requires_grad_()
        kl = token_kl(leaf, reference, backend=backend, **arguments)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
        assert kl.isinf().tolist() == infinite
        assert (kl >= 0).all()
        assert gradient.isnan().all(-1).tolist() == infinite
        assert gradient.isnan().any(-1).tolist() == infinite
        expected = eager(logits[:1, clean], reference[:1, clean], case)[0]
        torch.testing.assert_close(kl[:1].detach(), expected, rtol=1e-5, atol=1e-6)
        assert not gradient[0, :5000].any()


def test_a_token_that_only_the_policy_bans_adds_its_reference_mass(backend: str) -> None:
    logits = torch.tensor([[-INFINITY, 0.0, 0.0]])
    reference = torch.tensor([[0.5, 0.25, 0.25]]).log()
    leaf = logits.clone().requires_grad_()
    kl = token_kl(leaf, reference, backend=backend)  # type: ignore[arg-type]
    kl.sum().backward()
    torch.testing.assert_close(kl.detach(), torch.tensor([0.69314718]), rtol=0, atol=2e-7)
    torch.testing.assert_close(leaf.grad, torch.zeros(1, 3), rtol=0, atol=1e-7)


def test_ignored_rows_may_hold_anything(backend: str) -> None:
    for case in (CASES[0], CASES[5]):
        logits, reference = inputs((3, 40), (torch.float32, torch.float32))
        kl, gradient = run(logits, reference, backend, case)
        logits[1], reference[1, 3] = torch.nan, -INFINITY
        again = run(logits, reference, backend, case)
        assert torch.equal(again[0], kl)
        assert torch.equal(again[1], gradient)
        assert not kl[1].any()
        assert not gradient[1].any()


def test_a_nan_stays_in_its_row(backend: str) -> None:
    for side in (0, 1):
        both = inputs((3, 40), (torch.float32, torch.float32))
        both[side][2, 7] = torch.nan
        for case in (CASES[0], CASES[3]):
            kl, gradient = run(*both, backend, case)
            for value in (kl, gradient.sum(-1)):
                assert value.isnan().tolist() == [False, False, True]


def test_extreme_logits(backend: str) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [88.0, 89.0, 90.0], [-1.5e38, 0.0, 1.5e38]])
    reference = torch.tensor([[-1e4, 0.0, 1e4], [-88.0, -89.0, -90.0], [0.0, 0.0, 0.0]])
    leaf = logits.clone().requires_grad_()
    kl = token_kl(leaf, reference, backend=backend)  # type: ignore[arg-type]
    kl.sum().backward()
    expected = torch.tensor([2e4, 1.15042, 1.0986123])
    torch.testing.assert_close(kl.detach(), expected, rtol=1e-5, atol=0)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("case", [Case("reverse"), Case("forward", temperature=0.7)], ids=str)
def test_a_large_offset_of_all_logits_costs_no_precision(backend: str, case: Case) -> None:
    logits, reference = inputs((5, 600), (torch.float32, torch.float32))
    logits, reference = logits + 1e4, reference - 3e4
    truth = eager(logits.double(), reference.double(), case)
    for found, true in zip(run(logits, reference, backend, case), truth, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=2e-6)


def test_rows_need_not_be_contiguous(backend: str) -> None:
    logits, reference = inputs((6, 130), (torch.float32, torch.float32))
    views = logits[::2, 3:70], reference[1::2, 60:127]
    whole = run(views[0].contiguous(), views[1].contiguous(), backend, CASES[2])
    sliced = run(*views, backend, CASES[2])
    transposed = run(*(view.t().contiguous().t() for view in views), backend, CASES[2])
    for first, second, third in zip(whole, sliced, transposed, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first, third, rtol=1e-6, atol=1e-7)


def test_uninitialised_memory_is_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, reference = inputs((5, 77), (torch.float32, torch.float32))
    before = run(logits, reference, backend, CASES[2])
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        value = empty(*shape, **options)  # type: ignore[call-overload]
        return value.fill_(torch.nan) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poisoned)
    after = run(logits, reference, backend, CASES[2])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_reference_is_a_constant() -> None:
    logits, reference = inputs((3, 5), (torch.float32, torch.float32))
    assert not token_kl(logits, reference.requires_grad_()).requires_grad
    token_kl(logits.requires_grad_(), reference).sum().backward()
    assert reference.grad is None
