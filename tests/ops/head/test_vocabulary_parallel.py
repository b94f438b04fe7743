"""A vocabulary shared by two and three processes equals the whole head in one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastalign import VocabularyShard, linear_logprob
from fastalign.ops.head import buffers as linear_buffers
from fastalign.ops.head.head_tile import HeadTransform, Tile
from fastalign.ops.head.sharded_tiles import ShardReader
from tests.ops.head import vocabulary_parallel_worker
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    EAGER,
    ROWS,
    VOCABULARY,
    WIDTH,
    largest,
    leaves,
    some_targets,
)
from tests.ops.head.vocabulary_parallel_cases import CASES, SHARDED, SPLITS, Case, run
from tests.ops.head.vocabulary_parallel_worker import WORLD
from tests.rank_processes import run as run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, all cases in one run of three processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, folder, vocabulary_parallel_worker.main, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def of_ranks(case: Case, ranks: list[dict[str, Any]], what: str = "results") -> list[Any]:
    """From the ranks that have a part, in the order of their rows."""
    spans = SPLITS[case.split]
    order = sorted(range(len(spans)), key=lambda rank: spans[rank])
    return [ranks[rank][str(case)][what] for rank in order]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    parts = of_ranks(case, ranks)
    low = case.options.get("compute_dtype") is not None
    # brackets rounded as in one process; of banned tokens the definition has no entropy gradient
    plain = low or case.banned
    expected = run(case, None) if plain else run(case, None, **EAGER)
    for value, true in expected.items():
        found = torch.cat([part[value] for part in parts]) if value in SHARDED else parts[0][value]
        assert (found.dtype, found.shape) == (true.dtype, true.shape), value
        epsilon = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
        slack = 64 * epsilon * max(1.0, largest(true))
        if low and value in "hw":
            slack = torch.finfo(torch.bfloat16).eps * largest(true)
        torch.testing.assert_close(
            found.double(), true.double(), rtol=0, atol=slack, msg=lambda m, v=value: f"{v}: {m}"
        )
    assert parts[0].keys() == expected.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_same_bits(name: str, ranks: list[dict[str, Any]]) -> None:
    first, *others = of_ranks(CASES[name], ranks)
    for other in others:
        for value, one in first.items():
            if value not in SHARDED:
                assert torch.equal(one, other[value]), value


@pytest.mark.parametrize("name", CASES)
def test_collectives(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    first, *others = of_ranks(case, ranks, "collectives")
    assert all(other == first for other in others)
    forward = [c for c in first if not c[3]]
    gradients = [c for c in first if c[3]]
    # a maximum and one packed sum for each tile, of the same rows; the third is for the entropy
    packed = 2 if case.kind == "sequence_logprob" else 3
    assert [c[0] for c in forward] == ["max", "sum"] * (len(forward) // 2)
    for (_, _, one, _), (_, dtype, other, _) in zip(forward[::2], forward[1::2], strict=True):
        assert other == (packed, *one)
        assert dtype == ("torch.float64" if case.dtype == torch.float64 else "torch.float32")
    if case.options.get("max_buffer_bytes", None) is None:
        assert len(forward) == 2  # one chunk of one tile
    elif case.options["max_buffer_bytes"] == 800:
        assert len(forward) > 4
    rows = sum(c[2][0] for c in forward[::2])
    assert rows == ROWS if case.kind in ("logprob", "loss", "entropy_loss") else rows <= 36
    assert all(c[0] == "sum" and c[1] == forward[0][1] for c in gradients)
    if "h" not in case.trained:
        assert gradients == []
    elif case.kind in ("logprob", "loss") and "entropy" not in case.detail:
        assert sum(c[2][0] for c in gradients) == rows  # each row's gradient, once
        assert all(c[2][1] == WIDTH for c in gradients)


def test_a_backward_may_run_twice(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        first, second = rank["twice"]
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "culprit", "message"),
    [
        ("weight_of_one", 1, r"weight: expected the 13 rows 13\.\.26 .* got \(12, 8\)"),
        ("targets_of_one", 2, r"targets: expected 0\.\.36 or -100"),
        ("type_of_one", 0, "'>' not supported between"),
        ("budget", None, "max_buffer_bytes: expected the same on every rank .* got 100"),
        ("rows", None, r"hidden.shape: expected the same on every rank .* \(21, 8\)"),
        ("trained", None, "the gradients wanted: expected the same on every rank"),
        ("segments", None, "segments: expected the same on every rank .* got 3 bounds"),
        ("shards", None, r"cover 0\.\.37 once, got 0\.\.13, 0\.\.13, 0\.\.13"),
        ("shard_too_large", None, r"at most 13 rows a shard, or the most of any as `largest`"),
        ("outside", None, r"expected rows within 0\.\.37, got -1\.\.12"),
        ("budget_too_small", None, "max_buffer_bytes: expected at least .* got 10"),
        ("reference", None, "cannot run with 'reference' on a vocabulary's shard"),
        ("loss", None, "loss_fn: expected a scalar loss"),
    ],
)
def test_every_rank_raises(
    name: str, culprit: int | None, message: str, ranks: list[dict[str, Any]]
) -> None:
    for rank, found in enumerate(ranks):
        told = "" if culprit in (None, rank) else f"rank {culprit} of the group raised: "
        assert re.search(told + message, found["errors"][name]), found["errors"][name]


@pytest.mark.parametrize(
    ("vocab_size", "num_ranks", "expected"),
    [
        (12, 3, [(0, 4), (4, 8), (8, 12)]),
        (37, 3, [(0, 13), (13, 26), (26, 37)]),
        (4, 3, [(0, 2), (2, 4), (4, 4)]),
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
    ],
)
def test_an_even_split(
    vocab_size: int,
    num_ranks: int,
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: num_ranks)
    for rank, span in enumerate(expected):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        shard = VocabularyShard.even(None, vocab_size)
        assert (shard.start, shard.stop, shard.vocab_size) == (*span, vocab_size)
        assert shard.num_planned_columns == expected[0][1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[VocabularyShard]:
    """The whole vocabulary, in a group of one."""
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        yield VocabularyShard.even(None, VOCABULARY)
    finally:
        dist.destroy_process_group()


# dynamo looks at the result of what it left to eager
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_under_compile_it_is_left_to_eager(alone: VocabularyShard) -> None:
    hidden, weight, _ = leaves(torch.float64)
    targets = some_targets()

    def call() -> Tensor:
        return 2 * linear_logprob(hidden, weight, targets, vocabulary_shard=alone)

    assert torch.equal(torch.compile(call, backend="eager")(), call())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="vocabulary_shard"):
        torch.compile(call, backend="eager", fullgraph=True)()


def test_no_rows_and_no_look_at_free_memory(
    alone: VocabularyShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_buffers, "free_bytes", None)  # ranks could see different numbers
    hidden, weight, _ = leaves(torch.float64, rows=0)
    logprob = linear_logprob(hidden, weight, some_targets(0, ()), vocabulary_shard=alone)
    logprob.sum().backward()
    assert logprob.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_target_that_no_shard_has_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)  # one rank's sums are the whole
    products = torch.randn(4, 45, generator=torch.Generator().manual_seed(0))
    targets, ignored = torch.tensor([3, 45, -1, 0]), torch.tensor([False, False, False, True])
    tile = Tile(products, targets, ignored, HeadTransform())
    plan = linear_buffers.Plan(tile_rows=4, scratch_rows=4, saved_rows=0)
    buffers = linear_buffers.Buffers(plan, 45, torch.float32, products.device, "torch")
    reader, bracket = ShardReader(VocabularyShard(None, 0, 45, 45)), torch.empty(4, 45)
    read = reader.read(tile, buffers, bracket, with_entropy=True)
    assert read.logprob.isnan().tolist() == [False, True, True, False]
    assert bracket.isnan().all(1).tolist() == [False, True, True, False]
    assert bracket[[0, 3]].isfinite().all()
    assert read.entropy.isfinite().all()
    assert not read.is_argmax[1:].any()
