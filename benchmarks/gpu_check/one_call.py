"""Call a head's loss and gradient a few times: alone for ncu, or under PyTorch's profiler.

With `--profile` the figures are each kernel's number of calls and microseconds of a call.
"""

import torch

from benchmarks.gpu_check.head_paths import dpo_loss
from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.heads import CASES, forward_backward, make_inputs

CALLS = 3


def main() -> None:
    """Call it, once beforehand to compile and to allocate."""
    parser = make_parser("one_call", __doc__)
    parser.add_argument("--case", choices=list(CASES), default="llama-3-8b")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    inputs = make_inputs(CASES[arguments.case], device, torch.bfloat16)

    def call() -> None:
        forward_backward(lambda inputs: dpo_loss(inputs, arguments.backend), inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    if not arguments.profile:
        call()
        return
    with torch.profiler.profile() as profiler:
        for _ in range(CALLS):
            call()
    rows = Rows(arguments.json)
    on_gpu = device == "cuda"
    events = [event for event in profiler.key_averages() if not on_gpu or event.device_time_total]

    def microseconds(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return float(total) / CALLS

    for event in sorted(events, key=microseconds, reverse=True)[:40]:
        if microseconds(event) > 0:
            count = event.count / CALLS
            rows.add({"what": event.key, "calls": count, "microseconds": microseconds(event)})


if __name__ == "__main__":
    main()
