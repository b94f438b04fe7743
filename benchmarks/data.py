"""Measure how fast rows become tokens, and what memory all processes of a start take.

    python -m benchmarks.data --rows 200000 --ranks 2

It writes pairs of about 254 tokens, of words of the shipped comparisons, and starts `--ranks`
processes twice: they load the pairs, check their lengths and pack a first batch, without a model.
The second start finds the tokens that the first one wrote. Memory is the sum of the processes'
proportional sizes (PSS): pages that they share count once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastalign.written_files import write_atomically

BATCH_SIZE = 32
NUM_WORDS = 60  # of prompt, chosen and rejected each: about 254 tokens a row in all


def write_rows(path: Path, tokenizer_folder: Path, num_rows: int) -> None:
    """Write pairs, and the tokenizer of 8,192 tokens that reads them."""
    from fastalign.cli.models import train_tokenizer
    from fastalign.data.read import read_texts

    texts = resources.files("fastalign.samples") / "pros_cons"
    found = list(read_texts(str(texts / "texts_train.jsonl.gz")))
    train_tokenizer(found, 8192).save_pretrained(tokenizer_folder)
    words, draw = " ".join(found).split(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            starts = draw.sample(range(len(words) - NUM_WORDS), 3)
            row = [" ".join(words[first : first + NUM_WORDS]) for first in starts]
            columns = {"prompt": row[0], "chosen": f" {row[1]}", "rejected": f" {row[2]}"}
            file.write(json.dumps(columns) + "\n")


def first_step(path: str, tokenizer_folder: str, result: str) -> None:
    """Load the pairs as a run does and pack a step's batch; both wait for a line of the input."""
    from fastalign.batch.packed import pack
    from fastalign.batch.schedule import indices_of_step, packed_lengths
    from fastalign.batch.stored import stored
    from fastalign.data.load import load_examples
    from fastalign.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    print("ready", flush=True)
    sys.stdin.readline()
    before = sum(os.times()[:4])
    data = load_examples(path, "preference", tokenizer, max_length=1024)
    assert max(stored(data.groups).longest()) <= 1024
    lengths = packed_lengths(data.groups, "shared_prefix")
    pack([data.groups[i] for i in indices_of_step(len(data), BATCH_SIZE, 0, seed=0)])
    cpu = sum(os.times()[:4]) - before  # with that of the processes that it started
    write_atomically(Path(result), json.dumps([cpu, sum(lengths) / len(data)]))
    sys.stdin.readline()


def children(process: int) -> list[int]:
    """Return a process with all its descendants."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def memory(processes: Sequence[int]) -> int:
    """Return the sum of the PSS of processes and their descendants, in bytes."""
    total = 0
    for process in processes:
        try:
            members = children(process)
        except OSError:
            continue
        for member in members:
            try:
                text = Path(f"/proc/{member}/smaps_rollup").read_text()
            except OSError:  # it ended meanwhile
                continue
            lines = (line.split() for line in text.splitlines())
            total += sum(int(line[1]) * 1024 for line in lines if line[0] == "Pss:")
    return total


def start(folder: Path, num_ranks: int) -> dict[str, float]:
    """Return the seconds of one start of all ranks, and their memory before, at most and after."""
    command = [sys.executable, "-m", "benchmarks.data", "--first-step"]
    results = [folder / f"result{rank}" for rank in range(num_ranks)]
    ranks = []
    for result in results:
        result.unlink(missing_ok=True)
        arguments = [*command, *map(str, (folder / "pairs.jsonl", folder / "tokenizer", result))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(arguments, **pipes))
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    processes = [rank.pid for rank in ranks]
    before = peak = memory(processes)
    began = time.perf_counter()
    for rank in ranks:
        print(file=rank.stdin, flush=True)
    while not all(result.exists() for result in results):
        if any(rank.poll() is not None for rank in ranks):
            raise RuntimeError("a process ended early; its error is above")
        peak = max(peak, memory(processes))
        time.sleep(0.5)
    seconds = time.perf_counter() - began
    after = memory(processes)
    for rank in ranks:
        rank.communicate("\n")
    found = [json.loads(result.read_text()) for result in results]
    mib = {"before": before, "peak": peak, "after": after}
    return {
        "seconds": seconds,
        "CPU seconds": sum(cpu for cpu, _ in found),
        "tokens a row": found[0][1],
        **{f"MiB {name}": value / 2**20 for name, value in mib.items()},
    }


def main() -> None:
    """Print the figures of a first and a second start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--first-step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        first_step(*options.first_step)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_rows(folder / "pairs.jsonl", folder / "tokenizer", options.rows)
        for which in ("first start", "second start"):
            found = start(folder, options.ranks)
            figures = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            rate = options.rows / found["seconds"]
            free = 2 * options.rows / found["CPU seconds"]
            print(f"{which}, {options.ranks} ranks: {rate:.0f} rows/s; {figures}")
            print(f"  by its CPU time, on two cores that nothing else uses: {free:.0f} rows/s")
        kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*.arrow"))
        print(f"the cache: {kept / options.rows:.0f} bytes a row")


if __name__ == "__main__":
    main()
