"""Time a head's products and every way through it: what the pass over the logits costs.

The bare products are timed with bfloat16 and with float32 results, for the library may have slower
kernels for the second; then the losses of this package by backend, with the weight trained, frozen,
and without gradients: "epilogue", a product of our own that leaves no logits, has only the last.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.heads import (
    BETA,
    CASES,
    HeadCase,
    HeadInputs,
    forward_backward,
    forward_only,
    make_inputs,
)
from benchmarks.measure import device_name, measure
from fastalign import fused_linear_dpo_loss, linear_logprob
from fastalign.ops import linear_kl
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.products import product

BACKENDS = ("native", "triton", "torch", "epilogue")
Call = Callable[[], object]


def bare_products(inputs: HeadInputs) -> Iterator[tuple[str, Call]]:
    """Yield the three products alone, and together, by the dtype of their results."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    low = torch.zeros(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    for dtype in (hidden.dtype, torch.float32):
        name = str(dtype).removeprefix("torch.")
        logits, of_hidden, of_weight = (
            torch.empty(shape, dtype=dtype, device=hidden.device)
            for shape in (low.shape, hidden.shape, weight.shape)
        )
        calls = {
            "logits": partial(product, hidden, weight.t(), logits),
            "dHidden": partial(product, low, weight, of_hidden),
            "dWeight": partial(product, low.t(), hidden, of_weight),
        }
        for which, call in calls.items():
            yield f"product {which}, {name}", call
        yield f"products, {name}", partial(_all, list(calls.values()))


def _all(calls: list[Call]) -> None:
    for call in calls:
        call()


def dpo_loss(inputs: HeadInputs, backend: str) -> Tensor:
    """Return the DPO loss by `fused_linear_dpo_loss`."""
    rows = (inputs.hidden, inputs.weight, inputs.targets, inputs.cu_seqlens)
    return fused_linear_dpo_loss(*rows, inputs.reference_logprob, beta=BETA, backend=backend)[0]


def logprob(inputs: HeadInputs, backend: str) -> Tensor:
    """Return the log-probs by `linear_logprob`."""
    found = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, backend=backend)
    assert isinstance(found, Tensor)
    return found


def kl(inputs: HeadInputs, backend: str) -> Tensor:
    """Return the sum of the KL and the log-probs by `linear_kl`, of a head with itself."""
    frozen = inputs.hidden.detach(), inputs.weight.detach()
    found = linear_kl(inputs.hidden, inputs.weight, *frozen, inputs.targets, backend=backend)
    return found.kl + found.logprob


def paths(inputs: HeadInputs, backend: str) -> Iterator[tuple[str, Call, bool]]:
    """Yield name, call and whether the weight is trained."""
    for name, function in (("dpo", dpo_loss), ("linear_logprob", logprob), ("linear_kl", kl)):
        bound = partial(_with_backend, function, backend)
        if backend != "epilogue":
            yield f"{name}, trained", partial(forward_backward, bound, inputs), True
        if function is not kl:
            if backend != "epilogue":
                yield f"{name}, frozen", partial(forward_backward, bound, inputs), False
            yield f"{name}, forward", partial(forward_only, bound, inputs), False


def _with_backend(
    function: Callable[[HeadInputs, str], Tensor], backend: str, inputs: HeadInputs
) -> Tensor:
    return function(inputs, backend)


def time_case(case: HeadCase, device: str, num_rounds: int, rows: Rows) -> None:
    """Time everything of a case, one call after the other: together they would not fit."""
    dtype = torch.bfloat16
    inputs = make_inputs(case, device, dtype)

    def add(name: str, backend: str, call: Call) -> None:
        found = measure({name: call}, device, num_rounds=num_rounds)[name]
        rows.add(
            {
                "what": name,
                "backend": backend,
                "milliseconds": found.milliseconds,
                "spread": found.spread,
                "peak_bytes": found.peak_bytes,
                "tokens": case.num_tokens,
                "hidden_size": case.hidden_size,
                "vocabulary": case.vocab_size,
                "device": device_name(device),
                "torch": torch.__version__,
            }
        )

    for name, call in bare_products(inputs):
        add(name, "library", call)
        gc.collect()
    for backend in BACKENDS:
        reason = unusable_reason(backend, device, dtype)
        if reason is not None:
            rows.add({"backend": backend, "unusable": reason})
            continue
        for name, call, trained in paths(inputs, backend):
            inputs.weight.requires_grad_(trained)
            add(name, backend, call)


def main() -> None:
    """Time the case."""
    parser = make_parser("head_paths", __doc__)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--tokens", type=int, help="tokens in place of the case's")
    parser.add_argument("--vocabulary", type=int, help="vocabulary in place of the case's")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    case = replace(
        case,
        num_tokens=arguments.tokens or case.num_tokens,
        vocab_size=arguments.vocabulary or case.vocab_size,
    )
    time_case(case, arguments.device, arguments.rounds, Rows(arguments.json))


if __name__ == "__main__":
    main()
