"""The pass over a tile in two: every backend against PyTorch's strips in float64."""

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from fastalign.ops.head.head_tile import (
    HeadTransform,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    head_tile_gradient,
    head_tile_statistics,
)
from tests.ops.head.head_tile.head_tile_cases import (
    BACKENDS,
    SHAPES,
    TRANSFORMS,
    UPSTREAMS,
    products,
    run,
    transform_of,
    upstream_rows,
    use_backend,
)
from tests.tolerance import assert_no_worse

NAMES = ("maximum", "total", "weighted", "target")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_backend(request.param, monkeypatch)


def borders(num_columns: int) -> list[tuple[int, int]]:
    """Two shards, uneven; one where there is one column."""
    middle = num_columns // 3 + 1
    return [(0, middle), (middle, num_columns)] if middle < num_columns else [(0, num_columns)]


def statistics(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    backend: str = "torch",
    **options: bool,
) -> TileStatistics:
    scratch = tile.new_empty(2, 2, tile.shape[1])
    before = tile.clone()
    found = head_tile_statistics(
        Tile(tile, targets, ignored, transform), backend, scratch, **options
    )
    assert torch.equal(tile.nan_to_num(7.0), before.nan_to_num(7.0))  # it is only read
    return found


def whole_softmax(
    tile: Tensor, targets: Tensor, ignored: Tensor, transform: HeadTransform
) -> SoftmaxStatistics:
    """In float64, from all columns at once."""
    found = statistics(tile.double(), targets, ignored, transform)
    log_total = found.total.log()
    return SoftmaxStatistics(
        found.maximum, log_total, (log_total - found.weighted / found.total) * ~ignored
    )


def gradient(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    known: SoftmaxStatistics,
    upstream: tuple[bool, bool],
    backend: str = "torch",
    *,
    place: Tensor | None = None,
) -> Tensor:
    """The second pass in place, or into `place`."""
    place = tile if place is None else place
    head_tile_gradient(
        Tile(tile, targets, ignored, transform),
        SoftmaxStatistics(*(value.to(tile.dtype) for value in known)),
        backend,
        tile.new_empty(2, 2, tile.shape[1]),
        gradient=place,
        upstream=upstream_rows(targets, upstream),
    )
    return place


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_strips_are_the_formulas(name: str) -> None:
    tile, targets, ignored = products(7, 33)
    transform, shard = transform_of(name, 7), slice(11, 27)
    found = statistics(tile[:, shard].double(), targets - 11, ignored, transform)
    u = tile.double()
    if transform.softcap is not None:
        u = torch.tanh(u * transform.logit_scale / transform.softcap)
    z = u * transform.gain(u)
    here = (targets >= 11) & (targets < 27)
    assert 0 < int((here & ~ignored).sum()) < int((~ignored).sum())
    shifted = z[:, shard] - z[:, shard].amax(1, keepdim=True)
    expected = (
        u[:, shard].amax(1),
        shifted.exp().sum(1),
        (shifted * shifted.exp()).sum(1),
        torch.where(here, u.gather(1, targets[:, None])[:, 0], 0.0),
    )
    for value, true in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(getattr(found, value), true * ~ignored, rtol=0, atol=1e-12)


@lru_cache
def expected_statistics(shape: tuple[int, int], name: str) -> list[list[TileStatistics]]:
    """Of each shard: PyTorch's in float32, and in float64."""
    tile, targets, ignored = products(*shape)
    transform = transform_of(name, shape[0])
    return [
        [
            statistics(part, targets - start, ignored, transform)
            for part in (tile[:, start:stop], tile[:, start:stop].double())
        ]
        for start, stop in borders(shape[1])
    ]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_each_shard(backend: str, shape: tuple[int, int], name: str) -> None:
    tile, targets, ignored = products(*shape)
    transform = transform_of(name, shape[0])
    shards = zip(borders(shape[1]), expected_statistics(shape, name), strict=True)
    for (start, stop), (plain, true) in shards:
        arguments = (tile[:, start:stop], targets - start, ignored, transform, backend)
        found = statistics(*arguments)
        for value in NAMES:
            assert_no_worse(
                value,
                *(getattr(one, value) for one in (found, plain, true)),
                dtype=torch.float32,
                length=shape[1],
                scale=30.0,
            )
        without = statistics(*arguments, with_entropy=False)
        assert without.weighted is None
        assert torch.equal(without.total, found.total)


@lru_cache
def expected_gradients(
    shape: tuple[int, int], name: str
) -> tuple[SoftmaxStatistics, list[tuple[list[Tensor], Tensor]]]:
    """The softmax; for no upstream and for both, PyTorch's gradients by shard, and the truth."""
    tile, targets, ignored = products(*shape)
    transform = transform_of(name, shape[0])
    known = whole_softmax(tile, targets, ignored, transform)
    expected = []
    for upstream in UPSTREAMS[::3]:
        plain = [
            gradient(tile[:, a:b].clone(), targets - a, ignored, transform, known, upstream)
            for a, b in borders(shape[1])
        ]
        _, truth = run(tile.double(), targets, ignored, transform, upstream)
        expected.append((plain, truth))
    return known, expected


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_each_shard(backend: str, shape: tuple[int, int], name: str) -> None:
    tile, targets, ignored = products(*shape)
    known, expected = expected_gradients(shape, name)
    for upstream, (plain, truth) in zip(UPSTREAMS[::3], expected, strict=True):
        for (start, stop), eager in zip(borders(shape[1]), plain, strict=True):
            arguments = (targets - start, ignored, transform_of(name, shape[0]), known, upstream)
            for dtype in (torch.float32, torch.bfloat16):
                work = tile[:, start:stop].clone()
                place = torch.full_like(work, torch.nan, dtype=dtype)
                place = work if dtype == torch.float32 else place
                assert_no_worse(
                    "gradient",
                    gradient(work, *arguments, backend, place=place),
                    eager.to(dtype),
                    truth[:, start:stop],
                    dtype=dtype,
                    length=shape[1],
                    scale=1.0,
                )


def test_the_maximum_is_exactly_what_the_target_has(backend: str) -> None:
    # is_argmax compares the two, whatever rounding the transform has
    tile, _, ignored = products(40, 63)
    for name in TRANSFORMS:
        found = statistics(tile, tile.argmax(1), ignored.new_zeros(40), transform_of(name, 40))
        assert torch.equal(found.maximum, found.target)


def test_a_strided_tile_and_what_lies_beside_it(backend: str) -> None:
    tile, targets, ignored = products(6, 45)
    transform = transform_of("plain", 6)
    known = whole_softmax(tile, targets, ignored, transform)
    expected = gradient(
        tile[:, 3:].contiguous(), targets - 3, ignored, transform, known, (True, True), backend
    )
    wide, place = torch.full((6, 64), torch.nan), torch.full((6, 50), 7.0)
    wide[:, 3:45] = tile[:, 3:]
    arguments = (targets - 3, ignored, transform)
    found = statistics(wide[:, 3:45], *arguments, backend)
    assert torch.equal(found.maximum, tile[:, 3:].amax(1) * ~ignored)
    gradient(wide[:, 3:45], *arguments, known, (True, True), backend, place=place[:, :42])
    assert torch.equal(place[:, :42], expected)
    assert torch.equal(place[:, 42:], torch.full((6, 8), 7.0))
    assert wide[:, :3].isnan().all()
    assert wide[:, 45:].isnan().all()


def test_ignored_rows_and_banned_tokens_and_nans(backend: str) -> None:
    tile, targets, ignored = products(5, 45)
    transform = transform_of("plain", 5)
    tile[0, :20] = -torch.inf  # the first shard has nothing
    tile[1, 44] = torch.nan
    tile[2] = torch.nan
    assert ignored.tolist() == [False, False, True, False, False]
    targets[0] = 30
    first = statistics(tile[:, :20], targets, ignored, transform, backend)
    assert (first.maximum[0], first.total[0], first.weighted[0]) == (-torch.inf, 0, 0)
    second = statistics(tile[:, 20:], targets - 20, ignored, transform, backend)
    assert second.total.isnan().tolist() == [False, True, False, False, False]
    for value in NAMES:
        assert not getattr(first, value)[2]
    known = whole_softmax(tile, targets, ignored, transform)
    for start, stop in ((0, 20), (20, 45)):
        part = tile[:, start:stop].clone()
        found = gradient(part, targets - start, ignored, transform, known, (True, True), backend)
        assert not found[2].any()
        assert found[1].isnan().all()
        assert found[[0, 2, 3, 4]].isfinite().all()
        assert start or not found[0].any()


def test_no_rows(backend: str) -> None:
    tile, targets, ignored = products(1, 45)
    tile, targets, ignored = tile[:0], targets[:0], ignored[:0]
    transform = transform_of("plain", 0)
    assert statistics(tile, targets, ignored, transform, backend).maximum.shape == (0,)
    known = whole_softmax(tile, targets, ignored, transform)
    assert gradient(tile, targets, ignored, transform, known, (False, False), backend).numel() == 0


def test_a_sure_target_in_another_shard(backend: str) -> None:
    # every column here has p near 0, and 1 - p of the target must stay exact there
    tile, ignored = torch.zeros(1, 8), torch.zeros(1, dtype=torch.bool)
    tile[0, 6] = 20.0
    transform, targets = transform_of("plain", 1), torch.tensor([6])
    known = whole_softmax(tile, targets, ignored, transform)
    for start, stop in ((0, 4), (4, 8)):
        found = gradient(
            tile[:, start:stop].clone(),
            targets - start,
            ignored,
            transform,
            known,
            (False, False),
            backend,
        )
        other = math.exp(-20.0) / (1 + 7 * math.exp(-20.0))
        expected = torch.full((stop - start,), -other, dtype=torch.float64)
        if start:
            expected[2] = 7 * other
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
