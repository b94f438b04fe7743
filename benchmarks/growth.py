"""Growth of a DPO step's time and memory with pairs, prompt, response and vocabulary.

Along each axis the other sizes are those of `BASE`. An exponent e says that a step takes 2**e times
as long where the size is doubled.
"""

import argparse
import math
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.compare_steps import PRODUCTS, make_job, measure_turns
from benchmarks.measure import device_name
from benchmarks.step_cases import DEFAULT_SHAPES, SHAPES, ModelShape, StepCase, make_groups
from benchmarks.step_rows import Turns
from benchmarks.step_trainers import TRAINERS
from benchmarks.step_work import run_step_products
from benchmarks.step_worker import Job, Trainer

GROWTH = "growth"
CONTESTANTS = ("fastalign", "careful eager")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step."""

    pairs: int
    prompt: int
    response: int
    vocabulary: int


BASE = Sizes(pairs=1, prompt=128, response=128, vocabulary=8000)
FACTORS = (1, 4, 16)


@dataclass(frozen=True)
class GrowthRow:
    """One line of the table; the JSON file is a list of these.

    Attributes:
        axis: size that grows.
        size: its value.
        implementation: name of the trainer.
        dtype: dtype of the products.
        pass_: what is timed.
        milliseconds: median time of the turns.
        spread: (slowest - fastest) / median.
        peak_bytes: peak memory of a step, as of `compare dpo-step`.
        products_milliseconds: time of the bare matrix products.
        fraction_of_products: `products_milliseconds` over `milliseconds`.
        exponent: of the time from the size before to this one; None of the first.
        memory_exponent: likewise of the memory.
        device: name of the device.
        torch: version of torch.
    """

    axis: str
    size: int
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float
    spread: float
    peak_bytes: int | None
    products_milliseconds: float
    fraction_of_products: float
    exponent: float | None
    memory_exponent: float | None
    device: str
    torch: str


def exponent(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return e of value ~ size**e through two points (size, value)."""
    return math.log(after[1] / before[1]) / math.log(after[0] / before[0])


def job_of(sizes: Sizes, shape: ModelShape, folder: Path, arguments: argparse.Namespace) -> Job:
    """Write the models and rows of these sizes and return the job."""
    folder.mkdir()
    case = StepCase("growth", (sizes.prompt,) * 2, (sizes.response,) * 2)
    shape = replace(shape, vocab_size=sizes.vocabulary)
    groups = make_groups(case, sizes.vocabulary, sizes.pairs, 2)
    return make_job("dpo-step", shape, groups, folder, arguments)


def compare_axis(axis: str, shape: ModelShape, arguments: argparse.Namespace) -> list[GrowthRow]:
    """Measure the sizes of an axis, interleaved."""
    trainers = TRAINERS["dpo-step"]
    sizes = [getattr(BASE, axis) * factor for factor in FACTORS]
    contestants: dict[str, tuple[Trainer, Job]] = {}
    with tempfile.TemporaryDirectory() as path:
        for size in sizes:
            job = job_of(replace(BASE, **{axis: size}), shape, Path(path) / str(size), arguments)
            contestants[f"{PRODUCTS} {size}"] = (run_step_products, job)
            for name in CONTESTANTS:
                contestants[f"{name} {size}"] = (trainers[name], job)
        found = measure_turns(contestants, {}, arguments.rounds)
    return [row for name in CONTESTANTS for row in rows_of(axis, sizes, name, found)]


def rows_of(axis: str, sizes: list[int], name: str, found: dict[str, Turns]) -> list[GrowthRow]:
    """Return a contestant's rows."""
    rows: list[GrowthRow] = []
    for number, size in enumerate(sizes):
        turns, bare = found[f"{name} {size}"], found[f"{PRODUCTS} {size}"].milliseconds
        row = GrowthRow(
            axis=axis,
            size=size,
            implementation=name,
            dtype=turns.job.dtype,
            pass_="optimiser step",
            milliseconds=turns.milliseconds,
            spread=1e3 * (max(turns.seconds) - min(turns.seconds)) / turns.milliseconds,
            peak_bytes=turns.peak_bytes,
            products_milliseconds=bare,
            fraction_of_products=bare / turns.milliseconds,
            exponent=None,
            memory_exponent=None,
            device=device_name(turns.job.device),
            torch=torch.__version__,
        )
        if number:
            last = rows[-1]
            time = exponent((last.size, last.milliseconds), (size, row.milliseconds))
            row = replace(row, exponent=time)
            if row.peak_bytes is not None and last.peak_bytes is not None:
                memory = exponent((last.size, last.peak_bytes), (size, row.peak_bytes))
                row = replace(row, memory_exponent=memory)
        rows.append(row)
    return rows


def print_growth(rows: list[GrowthRow]) -> None:
    """Print the rows as a table."""
    print(
        f"{'axis':12}{'size':>8}  {'implementation':16}{'ms':>9}{'spread':>8}{'peak MiB':>10}"
        f"{'of products':>13}{'exponent':>10}{'of memory':>11}"
    )
    for row in rows:
        peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        exponents = [
            "" if value is None else f"{value:.2f}" for value in (row.exponent, row.memory_exponent)
        ]
        print(
            f"{row.axis:12}{row.size:8}  {row.implementation:16}{row.milliseconds:9.0f}"
            f"{row.spread:8.0%}{peak:>10}{row.fraction_of_products:13.0%}"
            f"{exponents[0]:>10}{exponents[1]:>11}"
        )
    print(f"The other sizes are {BASE}; a DPO step, the reference's log-probs known.")


def compare_growth(arguments: argparse.Namespace) -> list[GrowthRow]:
    """Measure every axis and print the table."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    shape = SHAPES[(arguments.model or DEFAULT_SHAPES[arguments.device])[0]]
    axes = arguments.case or [field.name for field in fields(Sizes)]
    rows = [row for axis in axes for row in compare_axis(axis, shape, arguments)]
    print_growth(rows)
    return rows
