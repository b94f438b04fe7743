"""`token_logprob`: every backend against float64, values and gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastalign import token_logprob
from fastalign.ops import native_library
from fastalign.ops.backends import choose_backend, unusable_reason
from fastalign.ops.token_logprob.api import token_logprob_forward
from tests.tolerance import assert_no_worse

NATIVE = unusable_reason("native", "cpu", torch.float32)
ISAS = [] if NATIVE else native_library.cpu_isas()
BACKENDS = ["reference", "triton", *(f"native-{isa}" for isa in ISAS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 2), (5, 16), (7, 63), (4, 507), (3, 2000), (2, 9001), (0, 8)]


@dataclass(frozen=True)
class Case:
    softcap: float | None = None
    temperature: float | str = 1.0

    def arguments(self, num_rows: int) -> dict[str, object]:
        temperature: object = self.temperature
        if temperature == "rows":
            temperature = torch.linspace(0.5, 2.0, num_rows)
        return {"softcap": self.softcap, "temperature": temperature}


CASES = [Case(), Case(temperature=0.7), Case(softcap=5.0, temperature="rows")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FASTALIGN_CPU_ISA", isa)
    return name


def inputs(shape: tuple[int, int], dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(shape[1], (shape[0],), generator=generator)
    if shape[0] > 2:
        targets[1] = -100
    return logits, targets


def run(logits: Tensor, targets: Tensor, backend: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    logprob, entropy = token_logprob(
        leaf,
        targets,
        return_entropy=True,
        backend=backend,  # type: ignore[arg-type]
        **case.arguments(len(targets)),  # type: ignore[arg-type]
    )
    weights = torch.linspace(-1, 1, len(targets), dtype=logprob.dtype)
    (logprob * weights + 0.3 * entropy * weights.flip(0)).sum().backward()
    assert leaf.grad is not None
    return logprob.detach(), entropy.detach(), leaf.grad


def eager(logits: Tensor, targets: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The lines in the docstring, differentiated by autograd."""
    leaf = logits.detach().requires_grad_()
    z = leaf if leaf.dtype == torch.float64 else leaf.float()
    arguments = case.arguments(len(targets))
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    temperature = arguments["temperature"]
    z = z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)  # type: ignore[operator]
    logprob = torch.log_softmax(z, dim=-1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    ignored = targets == -100
    picked = logprob.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    picked, entropy = picked.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)
    weights = torch.linspace(-1, 1, len(targets), dtype=picked.dtype)
    (picked * weights + 0.3 * entropy * weights.flip(0)).sum().backward()
    assert leaf.grad is not None
    return picked.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, case: Case
) -> None:
    logits, targets = inputs(shape, dtype)
    found = run(logits, targets, backend, case)
    plain = eager(logits, targets, case)
    truth = eager(logits.double(), targets, case)
    for name, ours, theirs, true in zip(
        ("logprob", "entropy", "gradient"), found, plain, truth, strict=True
    ):
        rounded = dtype if name == "gradient" else torch.float32
        assert_no_worse(name, ours, theirs, true, dtype=rounded, length=shape[1], scale=20.0)


def test_float64_is_the_references_and_exact() -> None:
    logits, targets = inputs((6, 31), torch.float32)
    for ours, theirs in zip(
        run(logits.double(), targets, "auto", CASES[2]),
        eager(logits.double(), targets, CASES[2]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_extreme_logits(backend: str) -> None:
    logits = torch.tensor(
        [[1e4, 0.0, -1e4], [-torch.inf, 2.0, 2.0], [88.0, 89.0, 90.0], [-1.5e38, 0.0, 1.5e38]]
    )
    targets = torch.tensor([0, 1, 2, 2])
    logprob, entropy, gradient = run(logits, targets, backend, Case())
    expected = torch.tensor([0.0, -0.69314718, -0.40760596, 0.0])
    torch.testing.assert_close(logprob, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        entropy, torch.tensor([0.0, 0.69314718, 0.83239555, 0.0]), rtol=0, atol=2e-6
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.parametrize("offset", [1e4, -3e5])
def test_a_large_offset_of_all_logits_costs_no_precision(
    backend: str, offset: float, case: Case
) -> None:
    logits, targets = inputs((5, 600), torch.float32)
    shifted = logits + offset
    assert shifted.diff().ne(0).any()
    truth = eager(shifted.double(), targets, case)
    for found, true in zip(run(shifted, targets, backend, case), truth, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=0, atol=4e-6)


def test_a_row_may_begin_with_banned_tokens(backend: str) -> None:
    logits = torch.full((2, 9001), -torch.inf)
    logits[0, 8990:] = torch.linspace(-1, 1, 11)
    logits[1, 4999] = 3.0
    targets = torch.tensor([8995, 4999])
    logprob, entropy, gradient = run(logits, targets, backend, Case())
    expected = torch.linspace(-1, 1, 11).log_softmax(-1)
    entropies = torch.stack([-(expected.exp() * expected).sum(), torch.tensor(0.0)])
    torch.testing.assert_close(logprob, torch.stack([expected[5], torch.tensor(0.0)]))
    torch.testing.assert_close(entropy, entropies)
    assert gradient.isfinite().all()
    assert gradient[:, :4999].eq(0).all()


def test_a_nan_stays_in_its_row(backend: str) -> None:
    logits, targets = inputs((3, 40), torch.float32)
    targets[1] = 0
    logits[1, 7] = torch.nan
    logprob, entropy, gradient = run(logits, targets, backend, Case())
    for value in (logprob, entropy, gradient.sum(-1)):
        assert value.isnan().tolist() == [False, True, False]


def test_a_target_that_is_no_column_gives_nan(backend: str) -> None:
    """The operation itself: the public function refuses such targets on a CPU, not on a GPU."""
    logits, targets = inputs((6, 77), torch.float32)
    strange = targets.clone()
    strange[[2, 4, 5]] = torch.tensor([77, -1, 2**40])
    found = []
    for given in (targets, strange):
        leaf = logits.clone().requires_grad_()
        logprob, entropy, *_ = token_logprob_forward(leaf, given, None, None, -100, backend)
        (logprob + entropy).sum().backward()
        assert leaf.grad is not None
        found.append((logprob.detach(), entropy.detach(), leaf.grad))
    (logprob, entropy, gradient), (strange_logprob, strange_entropy, strange_gradient) = found
    assert strange_logprob.isnan().tolist() == [False, False, True, False, True, True]
    assert strange_gradient[[2, 4, 5]].isnan().all()
    assert torch.equal(strange_entropy, entropy)
    assert torch.equal(strange_logprob[[0, 1, 3]], logprob[[0, 1, 3]])
    assert torch.equal(strange_gradient[[0, 1, 3]], gradient[[0, 1, 3]])


def test_rows_need_not_be_contiguous(backend: str) -> None:
    logits, targets = inputs((6, 130), torch.float32)
    whole = run(logits[::2, 3:70].contiguous(), targets[::2] % 67, backend, Case())
    sliced = run(logits[::2, 3:70], targets[::2] % 67, backend, Case())
    transposed = run(logits[::2, 3:70].t().contiguous().t(), targets[::2] % 67, backend, Case())
    for first, second, third in zip(whole, sliced, transposed, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first, third, rtol=1e-6, atol=1e-7)


def test_uninitialised_memory_is_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = inputs((5, 77), torch.float32)
    before = run(logits, targets, backend, CASES[2])
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        value = empty(*shape, **options)  # type: ignore[call-overload]
        return value.fill_(torch.nan) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poisoned)
    after = run(logits, targets, backend, CASES[2])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_each_gradient_alone(backend: str) -> None:
    logits, targets = inputs((4, 33), torch.float32)
    for part in (0, 1):
        gradients = []
        for name in (backend, "reference"):
            leaf = logits.clone().requires_grad_()
            results = token_logprob(leaf, targets, return_entropy=True, backend=name)  # type: ignore[call-overload]
            results[part].sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_reference_gradients_by_finite_differences() -> None:
    logits, targets = inputs((4, 6), torch.float64)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_logprob(
            x, targets, temperature=temperature, softcap=3.0, return_entropy=True
        ),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("name", ["reference", *([] if NATIVE else ["native"])])
def test_the_registration_passes_opcheck(name: str) -> None:
    logits, targets = inputs((5, 12), torch.float32)
    arguments = (logits.requires_grad_(), targets, None, 5.0, -100, name)
    torch.library.opcheck(token_logprob_forward, arguments)


def test_compiled_whole() -> None:
    logits, targets = inputs((5, 12), torch.float32)

    def loss(x: Tensor) -> Tensor:
        return token_logprob(x, targets, backend="reference").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, through = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(plain).backward()
    compiled(through).backward()
    torch.testing.assert_close(plain.grad, through.grad)


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_threads_change_nothing() -> None:
    logits, targets = inputs((64, 9000), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(run(logits, targets, "native", Case()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend: expected one of 'auto'"),
        ({"softcap": 0.0}, "softcap: expected a positive number"),
        ({"temperature": -1.0}, "temperature: expected a positive number"),
        ({"temperature": torch.ones(3)}, r"temperature: expected a number or \(4,\)"),
        ({"targets": torch.tensor([0, 1, 9, 2])}, "targets: expected 0..4 or -100.*got 9 at row 2"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected int64 \(4,\)"),
        ({"targets": torch.zeros(4)}, "targets: expected int64"),
        ({"logits": torch.zeros(4)}, "logits: expected a floating"),
        ({"logits": torch.zeros(4, 0)}, "logits: expected V > 0"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(4, 5),
        "targets": torch.zeros(4, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments)  # type: ignore[call-overload]


def test_a_named_backend_runs_or_raises_with_reason_and_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"Triton compiles for GPUs only.*TRITON_INTERPRET=1"):
        choose_backend("token_logprob", "triton", "cpu", torch.float32)
    with pytest.raises(ValueError, match="float32; backend='reference' computes in float64"):
        choose_backend("token_logprob", "native", "cpu", torch.float64)
    monkeypatch.setattr(native_library, "_load", lambda device: "the library was not built; do")
    with pytest.raises(ValueError, match="was not built; do"):
        choose_backend("token_logprob", "native", "cpu", torch.float32)
    assert choose_backend("token_logprob", "auto", "cpu", torch.float32) == "reference"
