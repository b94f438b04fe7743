"""Attention of packed rows in native code, against explicit sums in float64."""

import random

import pytest
import torch
from torch import Tensor

from fastalign.batch.packed import Group, pack
from fastalign.models.attention import native
from fastalign.models.attention.blocks import Blocks
from fastalign.models.attention.plan import row_segments
from fastalign.models.attention.segments import ScoreForm, Segments
from fastalign.ops import native_library
from tests.tolerance import assert_no_worse

pytestmark = pytest.mark.skipif(
    native_library.unusable_reason("cpu") is not None, reason="the CPU library was not built"
)
CPU = torch.device("cpu")
# Lengths of prompts and of their responses: whole tiles and panels, one more, one less.
LENGTHS = (
    ((1, (1,)),),
    ((5, (3, 1)), (1, (4, 2)), (33, (1,))),
    ((64, (64, 65, 63)), (200, (7, 90))),
    ((17, (150,)), (300, (1, 33))),
)


def segments_of(lengths: tuple[tuple[int, tuple[int, ...]], ...]) -> Segments:
    groups = [Group([1] * prompt, [[2] * n for n in own]) for prompt, own in lengths]
    return row_segments(pack(groups).layout)


def rows(
    segments: Segments, heads: tuple[int, int], sizes: tuple[int, int], seed: int = 0
) -> list[Tensor]:
    torch.manual_seed(seed)
    tokens, (query, key), (d, e) = segments.num_tokens, heads, sizes
    shapes = ((query, d), (key, d), (key, e), (query, e))
    return [torch.randn(tokens, *shape) for shape in shapes]


def explicit(inputs: list[Tensor], segments: Segments, form: ScoreForm) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values, under one mask of all tokens."""
    query, key, value, upstream = inputs
    leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    tokens = segments.num_tokens
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    columns = (segments.start, segments.length, segments.prompt_start, segments.prompt_length)
    for start, length, prompt, of_prompt in torch.stack(columns, 1).tolist():
        seen = [*range(prompt, prompt + of_prompt), *range(start, start + length)]
        for i in range(length):
            last = of_prompt + i + 1
            first = 0 if form.window is None else max(0, last - form.window)
            allowed[start + i, seen[first:last]] = True
    shared = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(shared, 1) for each in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", leaves[0], keys) * form.scale(query.shape[2])
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    output = torch.einsum("hij,jhe->ihe", weights, values)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def by_kernel(inputs: list[Tensor], segments: Segments, form: ScoreForm) -> list[Tensor]:
    groups = native.groups_of(segments)
    assert groups is not None
    leaves = [each.detach().clone().requires_grad_() for each in inputs[:3]]
    assert native.computes(*leaves, form)
    output = native.attend(*leaves, groups, form)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


def check(inputs: list[Tensor], segments: Segments, form: ScoreForm) -> None:
    found = by_kernel(inputs, segments, form)
    eager = explicit(inputs, segments, form)
    truth = explicit([each.double() for each in inputs], segments, form)
    names = ("output", "query", "key", "value")
    for name, *three in zip(names, found, eager, truth, strict=True):
        ours, theirs, exact = three
        size = float(exact.abs().max())
        assert_no_worse(
            name,
            ours,
            theirs,
            exact,
            dtype=torch.float32,
            length=segments.num_tokens,
            scale=max(size, 1.0),
        )


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_it_is_as_exact_as_explicit_sums(
    isa: str, lengths: tuple[tuple[int, tuple[int, ...]], ...], window: int | None
) -> None:
    segments = segments_of(lengths)
    check(rows(segments, (6, 2), (16, 16)), segments, ScoreForm(window=window))


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (64, 32), (40, 72)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (70, 1)])
def test_heads_and_sizes(isa: str, heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    segments = segments_of(((19, (3, 40)), (2, (70,))))
    check(rows(segments, heads, sizes), segments, ScoreForm())


@pytest.mark.parametrize("scaling", [0.0, 3.0, -0.7])
def test_scales(scaling: float) -> None:
    segments = segments_of(LENGTHS[1])
    check(rows(segments, (4, 2), (8, 8)), segments, ScoreForm(scaling=scaling))


def test_large_scores_are_shifted() -> None:
    segments = segments_of(LENGTHS[1])
    inputs = rows(segments, (4, 2), (8, 8))
    inputs[0] *= 300.0
    assert all(bool(each.isfinite().all()) for each in by_kernel(inputs, segments, ScoreForm()))
    check(inputs, segments, ScoreForm())


def test_random_rows() -> None:
    draw = random.Random(0)
    for seed in range(12):
        lengths = tuple(
            (draw.randrange(1, 80), tuple(draw.randrange(1, 90) for _ in range(draw.randint(1, 4))))
            for _ in range(draw.randint(1, 4))
        )
        segments = segments_of(lengths)
        window = draw.choice([None, draw.randrange(1, 100)])
        check(rows(segments, (6, 3), (24, 24), seed), segments, ScoreForm(window=window))


def test_its_bits_do_not_depend_on_threads_or_on_what_came_before() -> None:
    segments = segments_of(LENGTHS[2])
    inputs, form = rows(segments, (6, 3), (16, 16)), ScoreForm()
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            others = segments_of(LENGTHS[number])
            by_kernel([each * torch.nan for each in rows(others, (6, 3), (32, 32))], others, form)
            found.append(by_kernel(inputs, segments, form))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_bf16_rows_are_rounded_once() -> None:
    segments, form = segments_of(LENGTHS[2]), ScoreForm()
    inputs = [each.bfloat16() for each in rows(segments, (6, 2), (16, 16))]
    expected = by_kernel([each.float() for each in inputs], segments, form)
    for found, wide in zip(by_kernel(inputs, segments, form), expected, strict=True):
        assert torch.equal(found, wide.bfloat16())


def test_rows_of_any_layout() -> None:
    segments = segments_of(LENGTHS[1])
    inputs, form = rows(segments, (6, 2), (16, 16)), ScoreForm()
    groups = native.groups_of(segments)
    assert groups is not None
    expected = native.attend(*inputs[:3], groups, form)
    by_head = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in inputs[:3]]
    within = [torch.cat([each, each], -1)[..., : each.shape[2]] for each in inputs[:3]]
    beside = [torch.cat([each, each], 1)[:, : each.shape[1]] for each in inputs[:3]]
    for layout in (by_head, within, beside):
        assert torch.equal(native.attend(*layout, groups, form), expected)
    query = inputs[0].clone().requires_grad_()
    native.attend(query, *inputs[1:3], groups, form).sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None


def test_blocks_take_it_where_it_computes() -> None:
    segments = segments_of(LENGTHS[1])
    blocks, inputs = Blocks(segments, CPU), rows(segments, (6, 2), (16, 16))[:3]
    leaf = inputs[0].requires_grad_()
    assert "_Attention" in type(blocks.attend(leaf, *inputs[1:], ScoreForm()).grad_fn).__name__
    assert "padded" not in vars(blocks)  # blocks that nothing reads are not made
    for form in (ScoreForm(softcap=3.0), ScoreForm(sinks=torch.zeros(6))):
        assert "_Strips" in type(blocks.attend(leaf, *inputs[1:], form).grad_fn).__name__
    for dtype in (torch.float64, torch.float16):
        others = [each.detach().to(dtype).requires_grad_() for each in inputs]
        assert "_Strips" in type(blocks.attend(*others, ScoreForm()).grad_fn).__name__
    mixed = [inputs[0], *(each.bfloat16() for each in inputs[1:])]
    assert not native.computes(*mixed, ScoreForm())


def test_tasks_that_would_share_tokens_are_refused() -> None:
    segments = segments_of(((9, (4, 5)),))
    assert native.groups_of(segments) is not None
    shorter = segments.prompt_length.clone()
    shorter[-1] -= 1
    parts = (segments.start, segments.length, segments.prompt_start, shorter, segments.number)
    assert native.groups_of(Segments(*parts)) is None
