"""Time the head's fused DPO loss of two checkouts beside each other.

`python scripts/compare_head_times.py OLD NEW 4096,576,49152,float32,8 ...`: rows, hidden size,
vocabulary, dtype and pairs of each case; `,frozen` behind them leaves the weight out. Each
checkout, with its libraries built, runs in a process of its own with one thread; calls alternate,
and the medians of the seconds of computing are compared.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 6
CASE = re.compile(r"([1-9]\d*,){3}(float32|bfloat16),[1-9]\d*(,frozen)?")
CALL = "call\n"


def serve(case: str) -> None:
    """Answer each line of stdin with the seconds that a forward and a backward took."""
    import torch

    from fastalign import fused_linear_dpo_loss

    num_rows, hidden_size, num_columns = map(int, case.split(",")[:3])
    name, pairs, *frozen = case.split(",")[3:]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    dtype, num_responses = getattr(torch, name), 2 * int(pairs)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_columns, hidden_size, generator=generator) * 3 / hidden_size**0.5
    weight = weight.to(dtype).requires_grad_(not frozen)
    targets = torch.randint(num_columns, (num_rows,), generator=generator)
    bounds = torch.tensor([num_rows * n // num_responses for n in range(num_responses + 1)])
    for _ in sys.stdin:
        start = time.process_time()
        reference = torch.zeros(num_responses)
        loss, _ = fused_linear_dpo_loss(hidden, weight, targets, bounds, reference, beta=0.1)
        loss.backward()
        hidden.grad = weight.grad = None
        print(time.process_time() - start, flush=True)


def start(checkout: Path, case: str) -> subprocess.Popen[str]:
    """Start a checkout's process."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", case]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=checkout, env=environment, text=True, **pipes)


def seconds(process: subprocess.Popen[str]) -> float:
    """Return the seconds of one call."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(CALL)
    process.stdin.flush()
    return float(process.stdout.readline())


def main(arguments: list[str]) -> None:
    """Print a line for each case."""
    if arguments[:1] == ["--serve"]:
        return serve(arguments[1])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args(arguments)
    for case in options.cases:
        if not CASE.fullmatch(case):
            parser.error(f"expected a case such as 4096,576,49152,float32,8, got {case}")
    for case in options.cases:
        processes = [start(each.resolve(), case) for each in (options.old, options.new)]
        for process in processes:
            seconds(process)
        times: list[list[float]] = [[], []]
        for number in range(ROUNDS):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(seconds(processes[which]))
        for process in processes:
            process.communicate()
        old, new = map(statistics.median, times)
        print(f"{case}: {1e3 * old:.1f} ms, {1e3 * new:.1f} ms, {new / old:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
