"""The passes of each operation that `benchmarks.operations` and `benchmarks.tune` measure.

Each states the bytes that it must read and write at least.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastalign.losses import dpo, formula
from fastalign.ops import gae, kl_penalty, preference_loss, token_kl, token_logprob
from fastalign.ops.head.head_tile import (
    HeadTransform,
    SoftmaxStatistics,
    Tile,
    head_tile_gradient,
    head_tile_statistics,
    read_tile,
)
from fastalign.ops.head.kl_tile import read_pair

# T and V of the passes over logits; number of sequences and their length of the others.
SIZES = {"cpu": (512, 49152, 64, 1024), "cuda": (4096, 128256, 512, 4096)}

TILE = ("torch", "native", "triton")  # backends of a head's tile
ROWS = ("reference", "native", "triton")  # backends of row operations


@dataclass(frozen=True)
class Pass:
    """A pass: its call for a backend, and the bytes that it must move."""

    name: str
    kernel: str | None  # in Triton's table
    bytes_moved: int
    backends: tuple[str, ...]
    run: Callable[..., object]  # with `backend`


def logit_passes(device: str, dtype: torch.dtype) -> list[Pass]:
    """Return the passes over (T, V) logits."""
    num_rows, num_columns, *_ = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(num_rows, num_columns, device=device, generator=generator).to(dtype)
    reference = logits.roll(1, 1)
    targets = torch.randint(num_columns, (num_rows,), device=device, generator=generator)
    size = logits.numel() * logits.element_size()
    leaf = logits.clone().requires_grad_()
    upstream = torch.ones(num_rows, device=device)

    def gradient(operation: Callable[..., Tensor], other: Tensor, backend: str) -> None:
        value = operation(leaf, other, backend=backend)
        torch.autograd.grad((value * upstream).sum(), leaf)

    forward = partial(token_logprob, logits, targets, return_entropy=True)
    backward = partial(gradient, token_logprob, targets)
    kl_backward = partial(gradient, token_kl, reference)
    return [
        Pass("token_logprob", "token_logprob_fwd_kernel", size, ROWS, forward),
        Pass("token_logprob, with gradient", "token_logprob_bwd_kernel", 3 * size, ROWS, backward),
        Pass(
            "token_kl", "token_kl_fwd_kernel", 2 * size, ROWS, partial(token_kl, logits, reference)
        ),
        Pass("token_kl, with gradient", "token_kl_bwd_kernel", 5 * size, ROWS, kl_backward),
    ]


def head_tile_passes(device: str, place_dtype: torch.dtype) -> list[Pass]:
    """Return the passes over a head's float32 tile, which they overwrite."""
    tile, targets, ignored = _tile_inputs(device, 1)
    tile = tile[0]
    place = torch.empty_like(tile, dtype=place_dtype)
    scratch = tile.new_empty(2, 8, tile.shape[1])
    read, written = tile.numel() * 4, place.numel() * place.element_size()
    whole_tile = Tile(tile, targets, ignored, HeadTransform())
    known = head_tile_statistics(whole_tile, "torch", scratch)
    softmax = SoftmaxStatistics(known.maximum, known.total.log(), torch.zeros_like(known.total))

    def whole(backend: str, gradient: Tensor | None = None) -> object:
        return read_tile(whole_tile, backend, scratch, gradient=gradient)

    def statistics(backend: str) -> object:
        return head_tile_statistics(whole_tile, backend, scratch)

    def gradient(backend: str) -> object:
        return head_tile_gradient(whole_tile, softmax, backend, scratch, gradient=place)

    both, kernel = read + written, "head_tile_kernel"
    return [
        Pass("head_tile, statistics", kernel, read, TILE, whole),
        Pass("head_tile, in one pass", kernel, both, TILE, partial(whole, gradient=place)),
        Pass("head_tile_statistics", "head_tile_statistics_kernel", read, TILE, statistics),
        Pass("head_tile_gradient", "head_tile_gradient_kernel", both, TILE, gradient),
    ]


def kl_tile_passes(device: str, place_dtype: torch.dtype) -> list[Pass]:
    """Return the passes over two heads' float32 tiles, which they overwrite."""
    tiles, targets, ignored = _tile_inputs(device, 2)
    places = torch.empty_like(tiles, dtype=place_dtype)
    scratch = tiles.new_empty(4, 8, tiles.shape[2])
    read, written = tiles.numel() * 4, places.numel() * places.element_size()

    def pair(backend: str, brackets: Tensor | None = None) -> object:
        tile = Tile(tiles, targets, ignored, HeadTransform())
        return read_pair(tile, False, backend, scratch, brackets=brackets)

    in_one = partial(pair, brackets=places)
    return [
        Pass("kl_tile, statistics", "kl_tile_kernel", read, TILE, pair),
        Pass("kl_tile, in one pass", "kl_tile_kernel", read + written, TILE, in_one),
    ]


def _tile_inputs(device: str, num_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tiles (num_tiles, C, V), targets (C,) and a mask without ignored rows."""
    num_rows, num_columns, *_ = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    tiles = torch.randn(num_tiles, num_rows, num_columns, device=device, generator=generator)
    targets = torch.randint(num_columns, (num_rows,), device=device, generator=generator)
    return tiles, targets, torch.zeros(num_rows, dtype=torch.bool, device=device)


def sequence_passes(device: str) -> list[Pass]:
    """Return the passes over packed float32 values, one per token."""
    *_, num_sequences, length = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    num_tokens = num_sequences * length
    first, second = torch.randn(2, num_tokens, device=device, generator=generator)
    bounds = torch.arange(0, num_tokens + 1, length, device=device)
    per_sequence = torch.randn(num_sequences, device=device, generator=generator)
    size = num_tokens * 4
    preference = partial(preference_loss, first, bounds, formula(dpo, beta=0.1), per_sequence)
    penalty = partial(kl_penalty, first, second, bounds, per_sequence, coefficient=0.05)
    return [
        Pass("preference_loss", None, size, ROWS, preference),
        Pass("kl_penalty", None, 4 * size, ROWS, penalty),
        Pass("gae", None, 4 * size, ROWS, partial(gae, first, second, bounds)),
    ]
