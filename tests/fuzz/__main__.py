"""`python -m tests.fuzz`: mutated data files, random settings and random kills, from seeds.

Prints how many cases ended in which way, and each failure with its seed: a traceback, rows that are
not counted, a run that does not go on to the same end, or a case that takes too long. Exit code 0
only without failures.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from tests.fuzz import data_files, kills, settings
from tests.small_runs import fill

SECONDS = {"files": 20, "settings": 60, "kills": 600}  # beyond them, a case hangs
NUMBERS = {"files": 5000, "settings": 300, "kills": 60}


class HangError(Exception):
    """A case took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise HangError in the main thread when the time is over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def families(folder: Path) -> dict[str, Callable[[int], str]]:
    """Each family's function from a seed to how the case ended."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    fill(folder)
    flags, runs = settings.Stage(folder), kills.Stage(folder)
    return {
        "files": lambda seed: data_files.outcome(seed, folder, encoder_too=seed % 20 == 0),
        "settings": partial(settings.outcome, stage=flags),
        "kills": partial(kills.outcome, stage=runs),
    }


def run(family: str, case: Callable[[int], str], seeds: range) -> tuple[Counter[str], list[str]]:
    """Return how the cases ended, and a line for each failure."""
    ends: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        try:
            with limited(SECONDS[family]):
                ends[case(seed)] += 1
        except Exception as error:  # what a case raises is its failure
            ends["FAILED"] += 1
            failures.append(f"{family} {seed}: {type(error).__name__}: {error}")
    return ends, failures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    for family, number in NUMBERS.items():
        parser.add_argument(f"--{family}", type=int, default=number, help=f"default: {number}")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each family")
    options = parser.parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for family, case in families(Path(folder)).items():
            start, number = time.monotonic(), getattr(options, family)
            ends, failures = run(family, case, range(options.seed, options.seed + number))
            failed += len(failures)
            print(f"{family}: {number} in {time.monotonic() - start:.0f} s")
            print("\n".join(f"  {count:5} {end}" for end, count in ends.most_common()))
            for line in failures:
                print("  " + re.sub(r"\s+", " ", line)[:1500], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
