"""Tiles, transforms and backends for the tests of the passes over a head's tile."""

import pytest
import torch
from torch import Tensor

from fastalign.ops import native_library
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.head_tile import HeadTransform, RowStatistics, Tile, Upstream, read_tile
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


def upstream_rows(targets: Tensor, upstream: tuple[bool, bool]) -> Upstream:
    """The gradients of log-probs and entropies that come from upstream."""
    num_rows = len(targets)
    rows = torch.linspace(-1, 2, 2 * num_rows).to(targets.device)
    return Upstream(
        rows[:num_rows] if upstream[0] else None, rows[num_rows:] if upstream[1] else None
    )


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
    scratch = tile.new_empty(2, 2, tile.shape[1])
    gradient = tile if gradient is None else gradient
    read = read_tile(
        Tile(tile, targets, ignored, transform),
        backend,
        scratch,
        gradient=gradient,
        upstream=upstream_rows(targets, upstream),
    )
    return read, gradient


def use_backend(parameter: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of one of BACKENDS, with its instruction set chosen; skips where unusable."""
    name, _, isa = parameter.partition("-")
    if isa:
        monkeypatch.setenv("FASTALIGN_CPU_ISA", isa)
    if name != "torch" and unusable_reason(name, "cpu", torch.float32) is not None:
        pytest.skip(str(unusable_reason(name, "cpu", torch.float32)))
    return name


def check_long_rows(num_columns: int, name: str, backend: str, device: str = "cpu") -> None:
    """Compare a tile whose rows begin at multiples of 16 bytes, and lie apart, with float64."""
    tile, targets, ignored = products(4, num_columns)
    padded, transform = -(-num_columns // 16) * 16, transform_of(name, 4)
    stride = padded + 16
    # Triton's kernels overwrite the padding
    written = padded if backend == "triton" else num_columns
    targets[1], targets[3] = 0, num_columns - 1
    temperature = transform.temperature
    there = (targets.to(device), ignored.to(device))
    moved = HeadTransform(
        None if temperature is None else temperature.to(device),
        transform.softcap,
        transform.logit_scale,
    )
    for upstream in ((False, False), (True, True)):
        plain, plain_gradient = run(tile.clone(), targets, ignored, transform, upstream)
        true, true_gradient = run(tile.double(), targets, ignored, transform, upstream)
        for dtype in (torch.float32, torch.bfloat16):
            work = torch.full((4, stride), torch.nan, device=device)[:, :num_columns].copy_(tile)
            place = torch.full((4, stride), 7.0, dtype=dtype, device=device)
            target = work if dtype == torch.float32 else place[:, :num_columns]
            read, gradient = run(work, *there, moved, upstream, backend, gradient=target)
            for value in ("logprob", "entropy"):
                assert_no_worse(
                    value,
                    getattr(read, value).cpu(),
                    getattr(plain, value),
                    getattr(true, value),
                    dtype=torch.float32,
                    length=num_columns,
                    scale=30.0,
                )
            assert torch.equal(read.is_argmax.cpu(), true.is_argmax)
            assert_no_worse(
                "gradient",
                gradient.cpu(),
                plain_gradient.to(dtype),
                true_gradient,
                dtype=dtype,
                length=num_columns,
                scale=1.0,
            )
            assert place[:, written:].eq(7.0).all()
