"""The pass over a tile of products: every backend against PyTorch's strips in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from fastalign.ops import native_library
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head_tile import HeadTransform, RowStatistics, read_tile
from tests.tolerance import assert_no_worse

ISAS = native_library.cpu_isas() if native_library.unusable_reason("cpu") is None else []
BACKENDS = [*(f"native-{isa}" for isa in ISAS), "triton", "torch"]
SHAPES = [(1, 1), (3, 2), (5, 63), (9, 257), (4, 5000)]
TRANSFORMS = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.25},
    "temperature": {"temperature": torch.tensor([0.7])},
    "everything": {"softcap": 5.0, "logit_scale": 2.0, "temperature": "rows"},
}
# Which of grad_logprob and grad_entropy come from upstream.
UPSTREAMS = [(False, False), (True, False), (False, True), (True, True)]


def transform_of(name: str, num_rows: int) -> HeadTransform:
    options = dict(TRANSFORMS[name])
    if isinstance(options.get("temperature"), str):
        options["temperature"] = torch.linspace(0.4, 2.5, num_rows)
    return HeadTransform(**options)


def products(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 10_000 + num_columns)
    tile = 3 * torch.randn(num_rows, num_columns, generator=generator)
    targets = torch.randint(num_columns, (num_rows,), generator=generator)
    tile[0, targets[0]] = 30.0  # a row that is sure of its target
    return tile, targets, torch.arange(num_rows) % 4 == 2


def run(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    upstream: tuple[bool, bool],
    backend: str = "torch",
    *,
    gradient: Tensor | None = None,
) -> tuple[RowStatistics, Tensor]:
    """One pass in place, or into `gradient`."""
    rows = torch.linspace(-1, 2, 2 * len(targets)).chunk(2) if len(targets) else (targets, targets)
    scratch = tile.new_empty(2, 2, tile.shape[1])
    gradient = tile if gradient is None else gradient
    read = read_tile(
        tile,
        targets,
        ignored,
        transform,
        backend,
        scratch,
        gradient=gradient,
        grad_logprob=rows[0] if upstream[0] else None,
        grad_entropy=rows[1] if upstream[1] else None,
    )
    return read, gradient


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FASTALIGN_CPU_ISA", isa)
    if name != "torch" and unusable_reason(name, "cpu", torch.float32) is not None:
        pytest.skip(str(unusable_reason(name, "cpu", torch.float32)))
    return name


def test_the_strips_are_what_autograd_says() -> None:
    tile, targets, ignored = products(7, 33)
    for name, upstream in itertools.product(TRANSFORMS, UPSTREAMS):
        transform = transform_of(name, 7)
        leaf = tile.double().requires_grad_()
        z = leaf * transform.logit_scale
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        if transform.temperature is not None:
            z = z / transform.temperature.double().reshape(-1, 1)
        log_p = z.log_softmax(-1)
        logprob = log_p.gather(1, targets[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        rows = torch.linspace(-1, 2, 14).double().chunk(2)
        g = rows[0] if upstream[0] else torch.ones(7).double()
        e = rows[1] if upstream[1] else torch.zeros(7).double()
        (((g * logprob) + (e * entropy)) * ~ignored).sum().backward()
        read, gradient = run(tile.double(), targets, ignored, transform, upstream)
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-6)  # float32 upstream
        torch.testing.assert_close(read.logprob, logprob * ~ignored, rtol=0, atol=1e-12)
        torch.testing.assert_close(read.entropy, entropy * ~ignored, rtol=0, atol=1e-12)
        assert torch.equal(read.is_argmax, (tile.argmax(-1) == targets) & ~ignored)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(backend: str, shape: tuple[int, int], name: str) -> None:
    tile, targets, ignored = products(*shape)
    transform = transform_of(name, shape[0])
    for upstream in UPSTREAMS:
        plain, plain_gradient = run(tile.clone(), targets, ignored, transform, upstream)
        true, true_gradient = run(tile.double(), targets, ignored, transform, upstream)
        for dtype in (torch.float32, torch.bfloat16):
            work = tile.clone()
            place = work if dtype == torch.float32 else torch.full(shape, torch.nan, dtype=dtype)
            read, gradient = run(
                work, targets, ignored, transform, upstream, backend, gradient=place
            )
            for value in ("logprob", "entropy"):
                assert_no_worse(
                    value,
                    getattr(read, value),
                    getattr(plain, value),
                    getattr(true, value),
                    dtype=torch.float32,
                    length=shape[1],
                    scale=30.0,
                )
            assert torch.equal(read.is_argmax, true.is_argmax)
            assert_no_worse(
                "gradient",
                gradient,
                plain_gradient.to(dtype),
                true_gradient,
                dtype=dtype,
                length=shape[1],
                scale=1.0,
            )


def test_a_strided_tile_and_what_lies_beside_it(backend: str) -> None:
    tile, targets, ignored = products(6, 45)
    transform = transform_of("plain", 6)
    _, expected = run(tile.clone(), targets, ignored, transform, (True, True), backend)
    wide = torch.full((6, 64), torch.nan)
    wide[:, 3:48] = tile
    place = torch.full((6, 50), 7.0)
    _, gradient = run(
        wide[:, 3:48], targets, ignored, transform, (True, True), backend, gradient=place[:, :45]
    )
    assert torch.equal(gradient, expected)
    assert torch.equal(place[:, 45:], torch.full((6, 5), 7.0))
    assert wide[:, :3].isnan().all()
    assert wide[:, 48:].isnan().all()


def test_an_ignored_row_may_hold_anything(backend: str) -> None:
    tile, targets, ignored = products(6, 45)
    tile[2] = torch.nan
    read, gradient = run(tile, targets, ignored, transform_of("plain", 6), (False, False), backend)
    assert not gradient[2].any()
    assert (read.logprob[2], read.entropy[2], read.is_argmax[2]) == (0, 0, False)
    assert gradient.isfinite().all()


def test_a_nan_stays_one(backend: str) -> None:
    tile, targets, ignored = products(3, 45)
    tile[1, 44] = torch.nan
    read, _ = run(tile, targets, ignored, transform_of("plain", 3), (False, False), backend)
    assert read.logprob.isnan().tolist() == [False, True, False]


def test_a_banned_token_adds_nothing(backend: str) -> None:
    tile, targets, ignored = products(3, 45)
    targets = targets.clamp(min=1)
    tile[:, 0] = -torch.inf
    transform = transform_of("plain", 3)
    read, gradient = run(tile.clone(), targets, ignored, transform, (True, True), backend)
    without, expected = run(
        tile[:, 1:].contiguous(), targets - 1, ignored, transform, (True, True), "torch"
    )
    assert not gradient[:, 0].any()
    torch.testing.assert_close(gradient[:, 1:], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read.entropy, without.entropy, rtol=1e-5, atol=1e-6)
