"""The pass over two heads' tiles: every backend against PyTorch's strips in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.head_tile import HeadTransform, Tile
from fastalign.ops.head.kl_tile import PairStatistics, PairUpstream, read_pair
from tests.ops.head.head_tile.test_head_tile import BACKENDS, TRANSFORMS, transform_of
from tests.tolerance import assert_no_worse

SHAPES = [(1, 1), (3, 2), (5, 63), (2, 5000)]
DIRECTIONS = [False, True]
# every transform at one shape, and the two extremes at the others
CASES = [((9, 257), name) for name in TRANSFORMS]
CASES += [(shape, name) for shape in SHAPES for name in ("plain", "everything")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FASTALIGN_CPU_ISA", isa)
    if name != "torch" and unusable_reason(name, "cpu", torch.float32) is not None:
        pytest.skip(str(unusable_reason(name, "cpu", torch.float32)))
    return name


def products(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 10_000 + num_columns)
    tiles = 3 * torch.randn(2, num_rows, num_columns, generator=generator)
    targets = torch.randint(num_columns, (num_rows,), generator=generator)
    tiles[:, 0, targets[0]] = 30.0  # a row that is sure of its target
    return tiles, targets, torch.arange(num_rows) % 4 == 2


def upstream_of(tiles: Tensor) -> PairUpstream:
    num_rows = tiles.shape[1]
    return PairUpstream(*torch.linspace(-1, 2, 3 * num_rows, device=tiles.device).view(3, num_rows))


def run(
    tiles: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    over_reference: bool,
    backend: str = "torch",
    *,
    combined: bool = False,
    place: Tensor | None = None,
) -> tuple[PairStatistics, Tensor]:
    """One pass in place, or into `place`: brackets (2, C, V), or their combination (C, V)."""
    scratch = tiles.new_empty(4, 2, tiles.shape[2])
    if place is None:
        place = tiles[0] if combined else tiles
    read = read_pair(
        Tile(tiles, targets, ignored, transform),
        over_reference,
        backend,
        scratch,
        brackets=None if combined else place,
        gradient=place if combined else None,
        upstream=upstream_of(tiles) if combined else None,
    )
    return read, place


def by_autograd(
    tiles: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    over_reference: bool,
    total: Callable[[PairStatistics], Tensor],
) -> tuple[PairStatistics, Tensor]:
    """The lines that the pass replaces, and the policy's gradient of a total of them."""
    leaf = tiles[0].detach().requires_grad_()
    log_probs = []
    for side in (leaf, tiles[1]):
        z = side * transform.logit_scale
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        if transform.temperature is not None:
            z = z / transform.temperature.to(z.dtype).reshape(-1, 1)
        log_probs.append(z.log_softmax(-1))
    log_p, log_q = log_probs
    own, other = (log_q, log_p) if over_reference else (log_p, log_q)
    found = PairStatistics(
        log_p.gather(1, targets[:, None])[:, 0],
        log_q.gather(1, targets[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        (own.exp() * (own - other)).sum(-1),
    )
    found = PairStatistics(*(values.masked_fill(ignored, 0.0) for values in found))
    return found, torch.autograd.grad(total(found), leaf)[0]


@pytest.mark.parametrize("over_reference", DIRECTIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_strips_are_what_autograd_says(name: str, over_reference: bool) -> None:
    tiles, targets, ignored = products(7, 33)
    tiles, transform = tiles.double(), transform_of(name, 7)
    arguments = (targets, ignored, transform, over_reference)
    found, gradient = run(tiles.clone(), *arguments, combined=True)
    _, brackets = run(tiles.clone(), *arguments)
    upstream = upstream_of(tiles)

    def combination(found: PairStatistics) -> Tensor:
        return sum((getattr(found, n) * getattr(upstream, n)).sum() for n in upstream._fields)  # type: ignore[return-value]

    true, true_gradient = by_autograd(tiles, *arguments, combination)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, true_gradient, rtol=0, atol=1e-6)  # float32 upstream
    for bracket, value in zip(brackets, ("logprob", "kl"), strict=True):
        _, expected = by_autograd(tiles, *arguments, lambda f, v=value: getattr(f, v).sum())
        torch.testing.assert_close(bracket, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("over_reference", DIRECTIONS)
@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_statistics_and_gradients(
    backend: str, shape: tuple[int, int], name: str, over_reference: bool
) -> None:
    tiles, targets, ignored = products(*shape)
    arguments = (targets, ignored, transform_of(name, shape[0]), over_reference)
    for combined in (False, True):
        plain, plain_gradient = run(tiles.clone(), *arguments, combined=combined)
        true, true_gradient = run(tiles.double(), *arguments, combined=combined)
        for dtype in (torch.float32, torch.bfloat16):
            work, place = tiles.clone(), None
            if dtype != torch.float32:
                place = torch.full(true_gradient.shape, torch.nan, dtype=dtype)
            read, gradient = run(work, *arguments, backend, combined=combined, place=place)
            for value in PairStatistics._fields:
                assert_no_worse(
                    value,
                    getattr(read, value),
                    getattr(plain, value),
                    getattr(true, value),
                    dtype=torch.float32,
                    length=shape[1],
                    scale=30.0,
                )
            assert_no_worse(
                "gradient",
                gradient,
                plain_gradient.to(dtype),
                true_gradient,
                dtype=dtype,
                length=shape[1],
                scale=30.0,
            )


def test_statistics_alone(backend: str) -> None:
    tiles, targets, ignored = products(6, 45)
    transform = transform_of("everything", 6)
    expected, _ = run(tiles.clone(), targets, ignored, transform, False, backend)
    scratch = tiles.new_empty(4, 2, 45)
    found = read_pair(Tile(tiles, targets, ignored, transform), False, backend, scratch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("over_reference", DIRECTIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_equal_heads_have_no_kl_and_no_bracket(
    backend: str, name: str, over_reference: bool
) -> None:
    tiles, targets, ignored = products(9, 257)
    tiles[1] = tiles[0]
    read, brackets = run(tiles, targets, ignored, transform_of(name, 9), over_reference, backend)
    assert not read.kl.any()
    assert not brackets[1].any()
    assert torch.equal(read.logprob, read.reference_logprob)


def test_strided_tiles_and_what_lies_beside_them(backend: str) -> None:
    tiles, targets, ignored = products(6, 45)
    transform = transform_of("plain", 6)
    _, expected = run(tiles.clone(), targets, ignored, transform, False, backend)
    wide = torch.full((2, 6, 64), torch.nan)
    wide[:, :, 3:48] = tiles
    place = torch.full((2, 6, 50), 7.0)
    run(wide[:, :, 3:48], targets, ignored, transform, False, backend, place=place[:, :, :45])
    assert torch.equal(place[:, :, :45], expected)
    assert torch.equal(place[:, :, 45:], torch.full((2, 6, 5), 7.0))
    assert wide[:, :, :3].isnan().all()
    assert wide[:, :, 48:].isnan().all()


@pytest.mark.parametrize("combined", [False, True])
def test_a_target_that_is_no_column_gives_nan(backend: str, combined: bool) -> None:
    tiles, targets, ignored = products(6, 45)
    transform, strange = transform_of("plain", 6), targets.clone()
    strange[[1, 3]] = torch.tensor([45, -1])
    others = [0, 2, 4, 5]
    arguments = (ignored, transform, False, backend)
    expected, expected_place = run(tiles.clone(), targets, *arguments, combined=combined)
    read, place = run(tiles.clone(), strange, *arguments, combined=combined)
    for logprob in (read.logprob, read.reference_logprob):
        assert logprob.isnan().tolist() == [False, True, False, True, False, False]
    assert torch.equal(read.kl, expected.kl)
    assert torch.equal(read.entropy, expected.entropy)
    by_logprob, expected_by_logprob = (
        (place, expected_place) if combined else (place[0], expected_place[0])
    )
    assert by_logprob[[1, 3]].isnan().all()
    assert torch.equal(by_logprob[others], expected_by_logprob[others])
    if not combined:
        assert torch.equal(place[1], expected_place[1])


@pytest.mark.parametrize("combined", [False, True])
def test_an_ignored_row_may_hold_anything(backend: str, combined: bool) -> None:
    tiles, targets, ignored = products(6, 45)
    tiles[0, 2], tiles[1, 2, 5:] = torch.nan, -torch.inf
    transform = transform_of("softcap", 6)
    read, gradient = run(tiles, targets, ignored, transform, False, backend, combined=combined)
    assert not gradient[..., 2, :].any()
    assert [float(values[2]) for values in read] == [0, 0, 0, 0]
    assert gradient.isfinite().all()


def test_a_nan_stays_in_its_row(backend: str) -> None:
    for side in (0, 1):
        tiles, targets, ignored = products(3, 45)
        tiles[side, 1, 44] = torch.nan
        transform = transform_of("plain", 3)
        read, gradient = run(tiles, targets, ignored, transform, False, backend, combined=True)
        assert read.kl.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("over_reference", DIRECTIONS)
def test_banned_tokens(backend: str, over_reference: bool) -> None:
    tiles, targets, _ = products(5, 45)
    ignored = torch.tensor([False] * 4 + [True])
    targets = targets.clamp(min=1)
    tiles[:, :2, 0] = -torch.inf
    tiles[0, 2, 0] = -torch.inf  # by the policy alone
    tiles[1, 3:, 0] = -torch.inf  # by the reference alone
    transform = transform_of("plain", 5)
    infinite = [False, False, over_reference, not over_reference, False]
    for combined in (False, True):
        read, gradient = run(
            tiles.clone(), targets, ignored, transform, over_reference, backend, combined=combined
        )
        assert read.kl.isinf().tolist() == infinite
        assert read.logprob.isfinite().all()
        assert read.entropy.isfinite().all()
        of_kl = gradient if combined else gradient[1]
        assert of_kl.isnan().all(-1).tolist() == infinite
        assert of_kl.isnan().any(-1).tolist() == infinite
        if not combined:
            assert gradient[0].isfinite().all()
        without, expected = run(
            tiles[:, :2, 1:].contiguous(),
            targets[:2] - 1,
            ignored[:2],
            transform,
            over_reference,
        )
        torch.testing.assert_close(read.kl[:2], without.kl, rtol=1e-5, atol=1e-6)
        assert not gradient[..., :2, 0].any()
        if not combined:
            torch.testing.assert_close(gradient[:, :2, 1:], expected, rtol=1e-5, atol=1e-6)
