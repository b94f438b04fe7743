"""Count how often the host waits for the GPU in a DPO step, and where."""

import argparse
import contextlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compare_steps import make_job
from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.gpu_check.runner import ROOT
from benchmarks.step_cases import CASES, SHAPES, make_groups
from benchmarks.step_trainers import fastalign_dpo
from benchmarks.step_worker import WARM_UP_TURNS, Clock, Finished

SYNCHRONISES = "called a synchronizing"
COUNTED_TURNS = 3


class SynchronisationClock(Clock):
    """Lets a trainer take a few turns, and records the warnings of those after the warm-up."""

    def __init__(self, device: str, caught: list[warnings.WarningMessage]) -> None:
        super().__init__(None, device)  # type: ignore[arg-type]
        self._caught = caught
        self._turn = 0

    def end_turn(self) -> None:
        """Begin to record after the warm-up; leave the trainer's loop at the end."""
        self._turn += 1
        if self._turn == WARM_UP_TURNS:
            torch.cuda.set_sync_debug_mode("warn")
            self._caught.clear()
        if self._turn == WARM_UP_TURNS + COUNTED_TURNS:
            torch.cuda.set_sync_debug_mode("default")
            raise Finished


def counted(caught: Sequence[warnings.WarningMessage], num_turns: int) -> dict[str, float]:
    """Return the synchronisations of a turn by the place in a source file that waited."""
    places: Counter[str] = Counter()
    for warning in caught:
        if SYNCHRONISES in str(warning.message):
            name = Path(warning.filename)
            short = name.relative_to(ROOT) if name.is_relative_to(ROOT) else Path(*name.parts[-3:])
            places[f"{short}:{warning.lineno}"] += 1
    return {place: count / num_turns for place, count in places.most_common()}


def main() -> None:
    """Run the trainer and print the counts."""
    parser = make_parser("synchronisations", __doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=16)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    groups = make_groups(CASES["long-prompts"], shape.vocab_size, arguments.pairs, 2)
    options = argparse.Namespace(
        device=arguments.device, dtype=["bfloat16"], rounds=COUNTED_TURNS + 1
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_warn_always(True)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job("dpo-step", shape, groups, Path(folder), options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.suppress(Finished):
                fastalign_dpo(job, SynchronisationClock(arguments.device, caught))
    places, rows = counted(caught, COUNTED_TURNS), Rows(arguments.json)
    rows.add({"synchronisations": sum(places.values()), "model": shape.name})
    for place, count in places.items():
        rows.add({"place": place, "synchronisations": count})


if __name__ == "__main__":
    main()
