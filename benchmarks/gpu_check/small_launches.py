"""Launch every kernel once on small shapes: the program that a sanitizer watches.

Rows are odd and aligned, shorter and longer than a block, in both backends and all dtypes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.rows import Rows, make_parser
from fastalign import fused_linear_dpo_loss, linear_logprob
from fastalign.losses import dpo, formula
from fastalign.ops import gae, kl_penalty, linear_kl, preference_loss, token_kl, token_logprob
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.linear_head import LinearHead

NUM_ROWS = 6
VOCABULARIES = (1, 63, 1003, 9000, 4096)
WIDTH = 16
LENGTHS = (3, 0, 1, 2100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backward(value: Tensor) -> None:
    """Compute gradients of a value's sum."""
    value.float().sum().backward()


def head_calls(
    device: str, dtype: torch.dtype, vocabulary: int
) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Yield calls of the operations on logits and on a head, each for a backend."""
    generator = torch.Generator().manual_seed(vocabulary)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    logits, reference = leaf(NUM_ROWS, vocabulary), leaf(NUM_ROWS, vocabulary).detach()
    hidden, weight = leaf(NUM_ROWS, WIDTH), leaf(vocabulary, WIDTH)
    targets = torch.arange(NUM_ROWS, device=device) % vocabulary
    targets[1] = -100
    zeros = torch.zeros(2, device=device)
    bounds = [0, 1, 3, 4, NUM_ROWS]
    other, frozen = hidden.detach() * 0.5, weight.detach()
    yield "token_logprob", lambda backend: backward(token_logprob(logits, targets, backend=backend))
    yield "token_kl", lambda backend: backward(token_kl(logits, reference, backend=backend))
    yield (
        "linear_logprob",
        lambda backend: backward(linear_logprob(hidden, weight, targets, backend=backend)),
    )
    yield (
        "fused_linear_dpo_loss",
        lambda backend: backward(
            fused_linear_dpo_loss(
                hidden, weight, targets, bounds, zeros.repeat(2), softcap=30.0, backend=backend
            )[0]
        ),
    )
    yield (
        "linear_kl",
        lambda backend: backward(
            torch.stack(linear_kl(hidden, weight, other, frozen, targets, backend=backend))
        ),
    )


def product_calls(
    device: str, dtype: torch.dtype, vocabulary: int
) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Yield calls of a head's forward without logits, in one block and in parts of several."""
    for num_rows, hidden_size in ((NUM_ROWS, WIDTH), (131, 77)):
        hidden = torch.ones(num_rows, hidden_size, device=device, dtype=dtype)
        weight = torch.ones(vocabulary, hidden_size, device=device, dtype=dtype)
        targets = torch.arange(num_rows, device=device) % vocabulary
        yield (
            "linear_logprob",
            partial(_forward, hidden, LinearHead(weight, weight[:, 0], 30.0), targets),
        )


def _forward(hidden: Tensor, head: LinearHead, targets: Tensor, backend: str) -> object:
    return linear_logprob(hidden, head, targets, return_entropy=True, backend=backend)


def packed_calls(device: str) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Yield calls of the operations on packed responses, each for a backend."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    logprob, other = torch.randn(2, num_tokens, generator=generator).to(device)
    lengths = torch.tensor((0, *LENGTHS))
    bounds = lengths.cumsum(0).to(device)
    leaf = logprob.clone().requires_grad_()
    score = torch.zeros(len(LENGTHS), device=device)
    yield (
        "preference_loss",
        lambda backend: backward(
            preference_loss(leaf, bounds, formula(dpo, beta=0.1), score, backend=backend)[0]
        ),
    )
    yield (
        "kl_penalty",
        lambda backend: kl_penalty(logprob, other, bounds, coefficient=0.05, backend=backend),
    )
    yield "gae", lambda backend: gae(logprob, other, bounds, backend=backend)


def main() -> None:
    """Launch everything; the sanitizer says what was wrong."""
    arguments = make_parser("small_launches", __doc__).parse_args()
    device, rows = arguments.device, Rows(arguments.json)
    for backend in ("native", "triton", "epilogue"):
        reason = unusable_reason(backend, device, torch.float32)
        if reason is not None:
            rows.add({"backend": backend, "unusable": reason})
            continue
        for dtype in DTYPES:
            for vocabulary in VOCABULARIES:
                calls = product_calls if backend == "epilogue" else head_calls
                for name, call in calls(device, dtype, vocabulary):
                    call(backend)
                    rows.add({"operation": name, "backend": backend, "columns": vocabulary})
        for name, call in () if backend == "epilogue" else packed_calls(device):
            call(backend)
            rows.add({"operation": name, "backend": backend})
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
