"""Launches of every Triton kernel, made by the launchers themselves, for rows as long as a model's.

Legend: V columns of a row.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.gae import triton_kernels as gae
from fastalign.ops.gae.reference import Inputs as GaeInputs
from fastalign.ops.head.buffers import padded_columns
from fastalign.ops.head.head_product import triton_kernels as head_product
from fastalign.ops.head.head_tile import HeadTransform, SoftmaxStatistics, Tile, Upstream
from fastalign.ops.head.head_tile import triton_kernels as head_tile
from fastalign.ops.head.kl_tile import PairUpstream
from fastalign.ops.head.kl_tile import triton_kernels as kl_tile
from fastalign.ops.head.operands import HeadInputs
from fastalign.ops.kl_penalty import triton_kernels as kl_penalty
from fastalign.ops.kl_penalty.reference import Inputs as KlPenaltyInputs
from fastalign.ops.preference_loss import LinkFunction
from fastalign.ops.preference_loss import triton_kernels as preference_loss
from fastalign.ops.preference_loss.reference import Inputs as PreferenceLossInputs
from fastalign.ops.token_kl import triton_kernels as token_kl
from fastalign.ops.token_kl.reference import Inputs as TokenKlInputs
from fastalign.ops.token_logprob import triton_kernels as token_logprob
from fastalign.ops.token_logprob.reference import Inputs as TokenLogprobInputs

NUM_ROWS = 2
HIDDEN = 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUM_TOKENS = 4096  # of packed responses


class Launch(NamedTuple):
    """A launch of one kernel or several.

    Attributes:
        name: operation, dtype and options.
        reads_rows: True if it works on rows of V columns, whose width decides its speed.
        run: calls the launcher.
        oldest: the oldest architecture that it is for.
    """

    name: str
    reads_rows: bool
    run: Callable[[], object]
    oldest: int = 80


def launches(num_columns: int, everything: bool) -> Iterator[Launch]:
    """Launches of every kernel for rows of `num_columns`, with all options or without any.

    Those with all also vary what does not change a kernel's accesses: formulas, and dtypes beside
    bfloat16.
    """
    options = "with all options" if everything else "plain"
    for name, run in row_launches(num_columns, everything):
        yield Launch(f"{name}, {options}", True, run)
    for name, run in product_launches(num_columns, everything):
        yield Launch(f"{name}, {options}", True, run, 90)
    for name, run in packed_launches(everything):
        yield Launch(f"{name}, {options}", False, run)


def rows(dtype: torch.dtype, num_columns: int) -> Tensor:
    """Rows as far apart as those of a head's buffers on a GPU."""
    stride = padded_columns(num_columns, "cuda")
    return torch.zeros(NUM_ROWS, stride, dtype=dtype)[:, :num_columns]


def pair_rows(dtype: torch.dtype, num_columns: int) -> Tensor:
    return rows(dtype, num_columns).expand(2, -1, -1)


def row_values(count: int) -> list[Tensor]:
    return [torch.zeros(NUM_ROWS) for _ in range(count)]


def row_launches(num_columns: int, everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    temperature = torch.ones(NUM_ROWS) if everything else None
    softcap = 30.0 if everything else None
    targets = torch.zeros(NUM_ROWS, dtype=torch.int64)
    ignored = torch.zeros(NUM_ROWS, dtype=torch.bool)
    maybe_rows = torch.zeros(NUM_ROWS) if everything else None
    for dtype in FLOATS if everything else (torch.bfloat16,):
        logits = rows(dtype, num_columns)
        given = TokenLogprobInputs(logits, targets, temperature, softcap, -100, "triton")
        yield f"token_logprob, {dtype}", partial(token_logprob.forward, given)
        yield (
            f"token_logprob, backward, {dtype}",
            partial(token_logprob.backward, given, *row_values(5), maybe_rows),
        )
        pair = TokenKlInputs(
            logits,
            rows(torch.bfloat16, num_columns),
            temperature,
            ignored if everything else None,
            softcap,
            everything,
            "triton",
        )
        yield f"token_kl, {dtype}", partial(token_kl.forward, pair)
        yield f"token_kl, backward, {dtype}", partial(token_kl.backward, pair, *row_values(6))
    transform = HeadTransform(temperature, softcap, 0.5 if everything else 1.0)
    tile = Tile(rows(torch.float32, num_columns), targets, ignored, transform)
    pair_tile = Tile(pair_rows(torch.float32, num_columns), targets, ignored, transform)
    upstream = Upstream(maybe_rows, maybe_rows)
    known = SoftmaxStatistics(*row_values(3))
    yield "head_tile, statistics", partial(head_tile.read, tile, None, Upstream(), True)
    yield "head_tile_statistics", partial(head_tile.statistics, tile, everything)
    for dtype in (torch.float32, torch.bfloat16):
        place = tile.products if dtype == torch.float32 else rows(dtype, num_columns)
        yield f"head_tile, {dtype}", partial(head_tile.read, tile, place, upstream, True)
        yield (
            f"head_tile_gradient, {dtype}",
            partial(head_tile.gradient, tile, known, place, upstream),
        )
        places = pair_rows(dtype, num_columns)
        arguments = (
            (None, places[0], PairUpstream(*row_values(3))) if everything else (places, None, None)
        )
        yield f"kl_tile, {dtype}", partial(kl_tile.read, pair_tile, everything, *arguments)
    yield "kl_tile, statistics", partial(kl_tile.read, pair_tile, everything, None, None, None)


def product_launches(
    num_columns: int, everything: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    bias = torch.zeros(num_columns) if everything else None
    temperature = torch.ones(NUM_ROWS) if everything else None
    transform = HeadTransform(temperature, 30.0, 0.5) if everything else HeadTransform()
    targets = torch.zeros(NUM_ROWS, dtype=torch.int64)
    for dtype in FLOATS if everything else (torch.bfloat16,):
        hidden, weight = (torch.zeros(n, HIDDEN, dtype=dtype) for n in (NUM_ROWS, num_columns))
        lora = (hidden[:, :16], weight[:, :16]) if everything else (None, None)
        head = HeadInputs(hidden, weight, bias, targets, targets.bool(), transform, *lora)
        if not everything:
            yield f"head_product, {dtype}, no entropy", partial(head_product.read, head, False)
        yield f"head_product, {dtype}", partial(head_product.read, head, True)


def packed_launches(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    tokens, other, third = (torch.zeros(NUM_TOKENS) for _ in range(3))
    bounds = torch.tensor([0, 1000, NUM_TOKENS])
    pair, sequence = torch.zeros(1), torch.zeros(2)
    for link in LinkFunction if everything else (LinkFunction.LOGISTIC,):
        given = PreferenceLossInputs(
            tokens,
            bounds,
            sequence if everything else None,
            torch.ones(2, dtype=torch.int64) if everything else None,
            torch.zeros(1, dtype=torch.bool) if everything else None,
            int(link),
            everything,
            (0.1, 0.0, 0.0, 1.0, 0.0, 0.0),
            "triton",
        )
        yield f"preference_loss, {link.name}", partial(preference_loss.forward, given)
    yield (
        "preference_loss, backward",
        partial(
            preference_loss.backward,
            pair,
            sequence if everything else None,
            sequence,
            bounds,
            NUM_TOKENS,
        ),
    )
    for estimator in ("k3",) if everything else ("k1", "k2"):
        given = KlPenaltyInputs(
            tokens,
            other,
            bounds,
            sequence if everything else None,
            0.05,
            torch.tensor(0.05) if everything else None,
            torch.ones(NUM_TOKENS, dtype=torch.bool) if everything else None,
            estimator,
            10.0,
            "triton",
        )
        yield f"kl_penalty, {estimator}", partial(kl_penalty.forward, given)
        yield (
            f"kl_penalty, backward, {estimator}",
            partial(kl_penalty.backward, given, third, sequence if everything else None),
        )
    bootstrap = sequence if everything else None
    yield "gae", partial(gae.forward, GaeInputs(tokens, other, bounds, bootstrap, 0.99, 0.95, ""))
