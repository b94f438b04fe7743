"""The pass over a tile of products: every backend against PyTorch's strips in float64."""

import itertools

import pytest
import torch

from fastalign.ops.head.head_tile import HeadTransform
from tests.ops.head.head_tile.head_tile_cases import (
    BACKENDS,
    SHAPES,
    TRANSFORMS,
    UPSTREAMS,
    products,
    run,
    transform_of,
    use_backend,
)
from tests.tolerance import assert_no_worse


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_backend(request.param, monkeypatch)


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


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_a_target_that_is_no_column_gives_nan(backend: str, name: str) -> None:
    tile, targets, ignored = products(6, 45)
    transform, strange = transform_of(name, 6), targets.clone()
    strange[[1, 3]] = torch.tensor([45, -1])
    others = [0, 2, 4, 5]
    for upstream in UPSTREAMS:
        arguments = (ignored, transform, upstream, backend)
        expected, expected_gradient = run(tile.clone(), targets, *arguments)
        read, gradient = run(tile.clone(), strange, *arguments)
        assert read.logprob.isnan().tolist() == [False, True, False, True, False, False]
        assert gradient[[1, 3]].isnan().all()
        assert not read.is_argmax[[1, 3]].any()
        assert torch.equal(read.entropy, expected.entropy)
        assert torch.equal(gradient[others], expected_gradient[others])


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


def test_a_banned_target_has_a_finite_gradient(backend: str) -> None:
    tile, targets, ignored = products(3, 45)
    tile[torch.arange(3), targets] = -torch.inf
    transform = transform_of("plain", 3)
    read, gradient = run(tile.clone(), targets, ignored, transform, (True, True), backend)
    _, expected = run(tile.double(), targets, ignored, transform, (True, True))
    assert read.logprob.tolist() == [-torch.inf, -torch.inf, 0.0]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_largest_logit_is_the_argmax_at_any_temperature(backend: str) -> None:
    tile, _, _ = products(64, 45)
    targets, ignored = tile.argmax(-1), torch.zeros(64, dtype=torch.bool)
    transform = HeadTransform(torch.linspace(0.3, 3.0, 64), logit_scale=0.7)
    read, _ = run(tile, targets, ignored, transform, (False, False), backend)
    assert read.is_argmax.all()
