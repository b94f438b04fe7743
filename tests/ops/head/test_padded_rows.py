"""Rows that begin at multiples of 16 bytes, as on a GPU: the same numbers as without.

On a CPU a head's buffers are not padded; here they are, and so are logits that a caller gives.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastalign.ops import (
    TokenChunk,
    fused_linear_loss,
    linear_kl,
    linear_logprob,
    token_kl,
    token_logprob,
)
from fastalign.ops.backends import padded_width, unusable_reason
from fastalign.ops.head import buffers
from fastalign.ops.head.linear_kl.op import linear_kl_forward
from fastalign.ops.head.linear_logprob.op import linear_logprob_forward

VOCABULARY, WIDTH, ROWS = 37, 6, 9
STRIDE = 48  # of padded rows


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = unusable_reason(request.param, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def pad(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that makes a CPU's buffers those of a GPU."""
    return lambda: monkeypatch.setitem(buffers.ROW_MULTIPLE, "cpu", buffers.ROW_MULTIPLE["cuda"])


def leaves(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def some_targets() -> Tensor:
    targets = torch.arange(ROWS) * 5 % VOCABULARY
    targets[3] = -100
    return targets


def of_linear_logprob(dtype: torch.dtype, **options: object) -> list[Tensor]:
    hidden, weight, bias = leaves(0, dtype)
    results = linear_logprob(
        hidden, weight, some_targets(), bias=bias, return_entropy=True, **options
    )
    total = results[0].sum() + 0.3 * results[1].square().sum()
    return [*results, *torch.autograd.grad(total, (hidden, weight, bias))]


def of_linear_kl(dtype: torch.dtype, **options: object) -> list[Tensor]:
    hidden, weight, bias = leaves(0, dtype)
    reference = [value.detach() for value in leaves(1, dtype)[:2]]
    results = linear_kl(hidden, weight, *reference, some_targets(), bias=bias, **options)
    total = results.logprob.sum() + results.kl.square().sum()
    values = (results.logprob, results.reference_logprob, results.kl)
    return [*values, *torch.autograd.grad(total, (hidden, weight, bias))]


def of_fused_linear_loss(dtype: torch.dtype, **options: object) -> list[Tensor]:
    hidden, weight, bias = leaves(0, dtype)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        return chunk.logprob.square().sum(), {}

    loss, _ = fused_linear_loss(hidden, weight, some_targets(), None, loss_fn, bias=bias, **options)
    return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 3_000])
@pytest.mark.parametrize("operation", [of_linear_logprob, of_linear_kl, of_fused_linear_loss])
def test_padding_changes_no_number(
    backend: str,
    operation: Callable[..., list[Tensor]],
    budget: int | None,
    dtype: torch.dtype,
    pad: Callable[[], None],
) -> None:
    options = {"backend": backend, "max_buffer_bytes": budget}
    expected = operation(dtype, **options)
    pad()
    for found, value in zip(operation(dtype, **options), expected, strict=True):
        # a budget may hold a row less, so that sums are rounded in another order
        torch.testing.assert_close(
            found, value, rtol=1e-5 if dtype.itemsize == 4 else 2e-2, atol=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_columns", [1, 37, 50_257, 128_256, 128_257])
def test_rows_begin_where_the_widest_accesses_may(num_columns: int, dtype: torch.dtype) -> None:
    stride = buffers.padded_columns(num_columns, "cuda")
    assert num_columns <= stride < num_columns + 16
    assert stride % 16 == 0  # Triton's specialisation of an argument
    assert stride * dtype.itemsize % 16 == 0


def test_the_padding_counts_in_the_budget(pad: Callable[[], None]) -> None:
    pad()
    smallest = 4 * 48  # one row of float32
    of_linear_logprob(torch.float32, backend="triton", max_buffer_bytes=smallest)
    with pytest.raises(ValueError, match=f"max_buffer_bytes: expected at least {smallest} "):
        of_linear_logprob(torch.float32, backend="triton", max_buffer_bytes=smallest - 1)


def test_the_registrations_pass_opcheck(pad: Callable[[], None]) -> None:
    """The fakes' strides are those of the brackets."""
    pad()
    hidden, weight, bias = leaves(0, torch.float32)
    shared = (2.0, 0.5, -100, torch.float32, 100_000)
    one = (
        hidden,
        weight,
        bias,
        some_targets(),
        None,
        None,
        None,
        *shared,
        [True] * 3 + [False] * 2,
    )
    torch.library.opcheck(linear_logprob_forward, (*one, True, "torch"))
    other = [value.detach() for value in leaves(1, torch.float32)]
    two = (hidden, weight, bias, *other, some_targets(), None, True, *shared, [True] * 3)
    torch.library.opcheck(linear_kl_forward, (*two, "torch"))


def padded_logits(seed: int) -> Tensor:
    """Random logits (ROWS, VOCABULARY) with NaN behind each row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((ROWS, STRIDE), torch.nan)[:, :VOCABULARY]
    return logits.copy_(4 * torch.randn(logits.shape, generator=generator))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_lies_behind_given_logits_is_not_used(backend: str, softcap: float | None) -> None:
    def run(logits: Tensor, reference: Tensor, name: str) -> list[Tensor]:
        options = {"softcap": softcap, "temperature": 0.7, "backend": name}
        leaf = logits.detach().requires_grad_()
        kl = token_kl(leaf, reference, **options)
        logprob, entropy = token_logprob(leaf, some_targets(), return_entropy=True, **options)
        total = logprob.sum() + 0.3 * entropy.square().sum()
        gradients = (torch.autograd.grad(value, leaf)[0] for value in (kl.sum(), total))
        return [kl, logprob, entropy, *gradients]

    sides = [padded_logits(seed) for seed in range(2)]
    expected = run(*(side.contiguous() for side in sides), "reference")
    found_values = run(*sides, "reference" if backend == "torch" else backend)
    for found, value in zip(found_values, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=2e-5)


def test_rows_are_read_and_written_as_far_as_there_is_memory() -> None:
    logits = padded_logits(0)
    at_the_end = torch.zeros((ROWS - 1) * STRIDE + VOCABULARY)
    exact = at_the_end.as_strided(logits.shape, logits.stride())
    assert padded_width(logits) == padded_width(logits.expand(2, -1, -1), logits) == STRIDE
    assert padded_width(logits, exact) == padded_width(logits.contiguous()) == VOCABULARY
    rows = [torch.zeros(ROWS)] * 6
    arguments = (*rows, logits, logits, None, None, None, False, "triton")
    backward = torch.ops.fastalign.token_kl_backward
    with FakeTensorMode() as mode:
        tensors = (mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
        assert backward(*tensors).stride() == (STRIDE, 1)
    assert backward(*arguments).stride() == (STRIDE, 1)
