"""`linear_logprob` and `fused_linear_loss` on a GPU, beside float64 on the CPU."""

import itertools
import os

import pytest
import torch
from torch import Tensor

from fastalign import fused_linear_dpo_loss, linear_logprob
from fastalign.losses import dpo, formula
from fastalign.losses.chunk_losses import preference_loss_fn
from fastalign.ops import TokenChunk, fused_linear_loss
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.head_tile import HeadTransform, Tile, read_tile
from fastalign.ops.head.linear_logprob.api import read_head
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import (
    BUDGETS,
    GROUPS,
    TRANSFORMS,
    group_loss,
    leaves,
    some_targets,
)
from tests.ops.head.head_tile.head_tile_cases import check_long_rows
from tests.ops.head.linear_logprob.test_epilogue import FORMS, in_float64, make_call
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
BACKENDS = ["torch", "triton", "native"]


def skip_unusable(backend: str) -> None:
    reason = None
    if backend == "epilogue":  # which a GPU may be too old for
        reason = unusable_reason(backend, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)


def on(device: str, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def gradients(
    dtype: torch.dtype,
    device: str,
    transform: str,
    groups: str,
    rounded: torch.dtype,
    **options: object,
) -> dict[str, Tensor]:
    """The loss and its gradients of inputs that were rounded first, brought to the CPU."""
    values = [value.detach().to(rounded) for value in leaves(torch.float64)]
    values = [value.to(device, dtype).requires_grad_() for value in values]
    named = {name: on(device, value) for name, value in TRANSFORMS[transform].items()}
    loss, metrics = fused_linear_loss(
        values[0],
        values[1],
        some_targets().to(device),
        GROUPS[groups],
        group_loss(GROUPS[groups]),
        bias=values[2],
        **named,
        **options,
    )
    found = torch.autograd.grad(loss, values)
    return {
        "loss": loss.detach().cpu(),
        "entropy": metrics["entropy"].cpu(),
        **{name: value.cpu() for name, value in zip("hwb", found, strict=True)},
    }


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("groups", ["rows", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_linear_loss_is_no_worse_than_eager(
    backend: str, dtype: torch.dtype, groups: str, transform: str, budget: int | None
) -> None:
    case = (transform, groups, dtype)
    found = gradients(dtype, "cuda", *case, backend=backend, max_buffer_bytes=budget)
    eager = gradients(dtype, "cuda", *case, backend="reference")
    truth = gradients(torch.float64, "cpu", *case, backend="reference")
    for name, value in found.items():
        rounded = dtype if name in "hwb" else torch.float32
        assert_no_worse(name, value, eager[name], truth[name], dtype=rounded, length=64, scale=60.0)


@pytest.mark.parametrize("backend", [*BACKENDS, "epilogue"])
def test_a_long_sequence_is_exact_in_bfloat16(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 512, generator=generator).bfloat16().cuda()
    weight = (torch.randn(32_000, 512, generator=generator) * 3 / 512**0.5).bfloat16().cuda()
    targets = torch.randint(32_000, (4096,), generator=generator).cuda()
    skip_unusable(backend)
    found = linear_logprob(hidden, weight, targets, backend=backend).double().sum()
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    assert abs(float(found - log_p.gather(1, targets[:, None]).sum())) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_with_more_elements_than_32_bits_can_count(backend: str) -> None:
    num_rows, num_columns = 17_000, 128_256  # 2.18e9 elements
    tile = torch.zeros(num_rows, num_columns, device="cuda")
    tile[-1] = torch.linspace(-5, 5, num_columns)
    targets = torch.full((num_rows,), num_columns - 1, device="cuda")
    ignored = torch.zeros(num_rows, dtype=torch.bool, device="cuda")
    place = torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device="cuda")
    expected = tile[-1].double().log_softmax(-1)
    scratch = tile.new_empty(2, 64, num_columns)
    whole = Tile(tile, targets, ignored, HeadTransform())
    read = read_tile(whole, backend, scratch, gradient=place)
    assert abs(float(read.logprob[-1].double() - expected[-1])) < 1e-5
    torch.testing.assert_close(
        place[-1, :-1].double(), -expected[:-1].exp(), rtol=2**-8, atol=1e-12
    )


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("num_rows", [37, 300])
def test_an_epilogue_is_no_worse_than_the_library(
    num_rows: int, form: str, dtype: torch.dtype
) -> None:
    skip_unusable("epilogue")
    call = make_call(form, dtype, num_rows, width=300, vocabulary=1003)
    on_gpu = call._replace(
        **{name: on("cuda", value) for name, value in call._asdict().items() if name != "targets"},
        targets=call.targets.cuda(),
    )
    found, eager = read_head(on_gpu._replace(backend="epilogue")), read_head(on_gpu)
    truth = read_head(in_float64(call))
    scale = float(truth[0][truth[0].isfinite()].abs().max())
    for name, one, other, true in zip(("log-prob", "entropy"), found, eager, truth, strict=False):
        values = (one.cpu(), other.cpu(), true)
        assert_no_worse(name, *values, dtype=torch.float32, length=1003, scale=scale)
    assert torch.equal(found[2], eager[2])


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("num_columns", [16_384, 50_257, 128_256, 128_257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_of_a_tile(backend: str, num_columns: int, name: str) -> None:
    check_long_rows(num_columns, name, backend, "cuda")


def square(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
    return chunk.logprob.square().sum(), {}


@pytest.mark.parametrize(("backend", "frozen"), list(itertools.product(BACKENDS, [False, True])))
def test_nothing_waits_for_the_gpu(backend: str, frozen: bool) -> None:
    hidden, weight, bias = (
        value.detach().cuda().requires_grad_() for value in leaves(torch.float32)
    )
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    targets = some_targets().cuda()

    reference = torch.zeros(4, device="cuda")
    bounds = [0, 4, 9, 15, 21]
    of_pairs = preference_loss_fn(formula(dpo), bounds, reference, normaliser=2.0)

    def call() -> None:
        for segments, loss_fn in ((None, square), (bounds[::2], of_pairs)):
            loss, _ = fused_linear_loss(
                hidden, weight, targets, segments, loss_fn, bias=bias, backend=backend
            )
            loss.backward()
        linear_logprob(hidden, weight, targets, bias=bias, backend=backend).sum().backward()

    call()  # kernels are compiled and loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_pair_takes_less_memory_than_eager() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8192, 512, generator=generator).bfloat16().cuda().requires_grad_()
    weight = torch.randn(64_000, 512, generator=generator).bfloat16().cuda().requires_grad_()
    targets = torch.randint(64_000, (8192,), generator=generator).cuda()

    def fused() -> Tensor:
        return fused_linear_dpo_loss(
            hidden, weight, targets, [0, 4096, 8192], torch.zeros(2, device="cuda")
        )[0]

    def eager() -> Tensor:
        logprob = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])
        first, second = logprob.view(2, -1).sum(1)
        return -torch.nn.functional.logsigmoid(0.1 * (first - second))

    peaks = []
    for function in (fused, eager):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(), (hidden, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 2
