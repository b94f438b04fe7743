"""Compare head implementations: check that they agree, time them, print a table.

Every implementation's result is compared with the eager one's before it is timed; `head` also runs
the head's tests first and stops if they fail.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.heads import (
    CASES,
    DEFAULT_CASES,
    IMPLEMENTATIONS,
    HeadCase,
    HeadInputs,
    backward,
    forward,
    forward_backward,
    forward_only,
    make_inputs,
    products,
)
from benchmarks.measure import Prepared, device_name, measure
from benchmarks.peers import usable_peers
from fastalign.ranks.world import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# |loss - eager loss| / |eager loss|; the eager loss itself rounds its logits to the dtype.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Name: (whether the weight is trained, number of products). An implementation that computes the
# gradient in its forward pass does almost nothing in the backward pass.
PASSES = {
    "forward": (True, 1),
    "backward": (True, 2),
    "forward+backward": (True, 3),
    "forward+backward, frozen": (False, 2),
}
ROOT = Path(__file__).parents[1]
OURS = ("eager", "fastalign")  # whose failure ends a comparison; a peer's leaves it out
# The head's tests, by device: those of a CPU interpret Triton's kernels.
TESTS = {
    "cpu": [
        "tests/ops/head/fused_linear_loss/test_fused_linear_loss.py",
        "tests/ops/head/head_tile/test_head_tile.py",
    ],
    "cuda": ["tests/gpu/test_heads_gpu.py", "tests/gpu/test_head_tile_split_gpu.py"],
}


@dataclass(frozen=True)
class Row:
    """One line of the table; the JSON file is a list of these."""

    case: str
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float
    spread: float
    peak_bytes: int | None
    flops: int
    products_milliseconds: float
    fraction_of_products: float
    device: str
    torch: str


def implementations_of(
    name: str, device: str, wanted: list[str]
) -> dict[str, Callable[[HeadInputs], Tensor]]:
    """Return our implementations and the wanted peers that can run here."""
    peers, reasons = usable_peers(name, device, wanted)
    for peer, reason in reasons.items():
        print(f"without {peer}: {reason}")
    return {**IMPLEMENTATIONS[name], **peers}


def agreeing(
    case: HeadCase, inputs: HeadInputs, functions: dict[str, Callable[[HeadInputs], Tensor]]
) -> dict[str, Callable[[HeadInputs], Tensor]]:
    """Return the implementations that agree with eager; print others, and exit if one is ours.

    A peer may be of any release, and fail in its own ways on this torch or Triton.
    """
    truth = forward_only(functions["eager"], inputs)
    found = {}
    for implementation, function in functions.items():
        try:
            result = forward_only(function, inputs)
            if implementation not in OURS:
                forward_backward(function, inputs)
        except Exception as failure:
            if implementation in OURS:
                raise
            print(f"not timed: {case.name}: {implementation} fails: {first_line(failure)}")
            continue
        error = float((result - truth).abs() / truth.abs())
        if error <= AGREEMENT[inputs.hidden.dtype]:
            found[implementation] = function
            continue
        message = f"{case.name}: {implementation} differs from eager by {error:.2e}"
        if implementation in OURS:
            raise SystemExit(message)
        print(f"not timed: {message}")
    return found


def call_of(
    pass_: str, function: Callable[[HeadInputs], Tensor], inputs: HeadInputs
) -> Callable[[], object] | Prepared:
    """Return the timed call of an implementation."""
    if pass_ == "backward":
        run = functools.partial(backward, inputs=inputs)
        return Prepared(functools.partial(forward, function, inputs), run)
    whole = forward_only if pass_ == "forward" else forward_backward
    return functools.partial(whole, function, inputs)


def compare_case(
    name: str,
    case: HeadCase,
    device: str,
    dtype_name: str,
    num_rounds: int,
    functions: dict[str, Callable[[HeadInputs], Tensor]],
    passes: Sequence[str] = (),
) -> list[Row]:
    """Check agreement, then measure the implementations and the bare products of a case.

    `passes` are the keys of `PASSES` to measure; by default those that tell something new.
    """
    inputs = make_inputs(case, device, DTYPES[dtype_name])
    functions = agreeing(case, inputs, functions)
    rows = []
    for pass_, (trained, num_products) in PASSES.items():
        # a case of one pair measures memory and needs only one pass
        default = pass_ == "forward+backward" or (name == "head" and case.num_pairs > 1)
        if not (pass_ in passes if passes else default):
            continue
        print(f"{case.name}, {dtype_name}, {pass_} ...", file=sys.stderr, flush=True)
        inputs.weight.requires_grad_(trained)
        calls: dict[str, Callable[[], object] | Prepared] = {
            implementation: call_of(pass_, function, inputs)
            for implementation, function in functions.items()
        }
        calls["products"] = functools.partial(products, inputs, num_products)
        measured = measure(calls, device, num_rounds=num_rounds)
        bare = measured.pop("products").milliseconds
        rows += [
            Row(
                case=case.name,
                implementation=implementation,
                dtype=dtype_name,
                pass_=pass_,
                milliseconds=found.milliseconds,
                spread=found.spread,
                peak_bytes=found.peak_bytes,
                flops=case.flops(num_products),
                products_milliseconds=bare,
                fraction_of_products=bare / found.milliseconds,
                device=device_name(device),
                torch=torch.__version__,
            )
            for implementation, found in measured.items()
        ]
    return rows


def print_table(rows: list[Row]) -> None:
    """Print the rows as a table."""
    print(
        f"{'case':22}{'pass':26}{'implementation':15}{'dtype':10}{'ms':>9}{'spread':>8}"
        f"{'peak MiB':>10}{'products ms':>13}{'of products':>13}"
    )
    for row in rows:
        peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        print(
            f"{row.case:22}{row.pass_:26}{row.implementation:15}{row.dtype:10}"
            f"{row.milliseconds:9.1f}{row.spread:8.0%}{peak:>10}"
            f"{row.products_milliseconds:13.1f}{row.fraction_of_products:13.0%}"
        )


def refuse_on_a_red_test(device: str) -> None:
    """Exit if the head's own tests on the device fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS[device]]
    environment = os.environ | ({"FASTALIGN_TEST_GPU": "1"} if device == "cuda" else {})
    done = subprocess.run(command, cwd=ROOT, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"nothing is timed: {' '.join(TESTS[device])} failed")


def compare_heads(
    name: str,
    cases: list[str],
    device: str,
    dtype_names: list[str],
    num_rounds: int,
    wanted_peers: list[str],
    *,
    tested: bool = False,
    passes: Sequence[str] = (),
) -> list[Row]:
    """Measure the cases (the defaults if none is named) and print the table.

    `tested` says that the head's tests were run by somebody else, and are not run again.
    """
    if name == "head" and not tested:
        refuse_on_a_red_test(device)
    functions = implementations_of(name, device, wanted_peers)
    rows = [
        row
        for dtype_name in dtype_names
        for case in cases or DEFAULT_CASES[name, device]
        for row in compare_case(
            name, CASES[case], device, dtype_name, num_rounds, functions, passes
        )
    ]
    print_table(rows)
    return rows
