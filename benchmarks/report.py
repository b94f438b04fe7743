"""Measure the report of a long run: its time, and the peak of its memory.

    python -m benchmarks.report --steps 100000

It writes a run's folder with the metrics of DPO, and calls `fastalign report` on it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = (
    *("loss", "entropy", "grad_norm", "learning_rate", "epoch", "num_tokens"),
    *("tokens_per_second", "step_seconds", "time/gradient_seconds", "time/optimizer_seconds"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *(f"{name}/{side}" for name in ("logps", "logits") for side in ("chosen", "rejected")),
)


def write_run(folder: Path, num_steps: int) -> None:
    """Write the settings and metrics of a run."""
    (folder / "config.yaml").write_text("run: {seed: 1}\nloss: {name: dpo, beta: 0.1}\n")
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            counts = {"step": step, "skipped": int(step % 1000 == 0), "num_micro_batches": 2}
            row = counts | {"peak_memory_bytes": 10**9} | {name: draw.random() for name in NAMES}
            held_out = {"eval_loss": draw.random()} if step % 1000 == 0 else {}
            file.write(json.dumps(row | held_out) + "\n")


def main() -> None:
    """Print the seconds and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        write_run(Path(name), steps)
        call = "import sys; from fastalign.cli.main import main; sys.exit(main(sys.argv[1:]))"
        out = str(Path(name) / "report.html")
        start = time.perf_counter()
        command = [sys.executable, "-c", call, "report", name, "--out", out]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError("fastalign report failed; its error is above")
        seconds = time.perf_counter() - start
        cpu = usage.ru_utime + usage.ru_stime
        print(f"{steps} steps: {seconds:.1f} s, {cpu:.1f} s of CPU, {usage.ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    main()
