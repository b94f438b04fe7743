"""Steps side by side: who is compared on what, whether they agree, and their table."""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import device_name
from benchmarks.step_cases import (
    CASES,
    DEFAULT_CASES,
    DEFAULT_PAIRS,
    DEFAULT_SHAPES,
    SHAPES,
    ModelShape,
    make_groups,
    read_groups,
    write_model,
    write_rows,
)
from benchmarks.step_trainers import TRAINERS
from benchmarks.step_work import (
    PEAK_FLOPS,
    TRUTHS,
    run_products,
    run_products_without_head,
    useful_flops,
    useful_tokens,
)
from benchmarks.step_worker import WARM_UP_TURNS, Job, Trainer, Worker
from fastalign.batch import Group

PRODUCTS = "products"
# |loss - eager loss| / |eager loss| of the first step; the eager one is float32 for all.
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class StepRow:
    """One line of the table; the JSON file is a list of these.

    Attributes:
        case: lengths of the rows.
        model: its shape.
        implementation: whose step.
        dtype: of the products.
        pass_: what is timed.
        milliseconds: median of the turns.
        spread: (slowest - fastest) / median.
        peak_bytes: most memory in the timed turns, the model's own included: resident beyond what
            was resident before the model was built, or the CUDA allocator's.
        flops: that no implementation can avoid (`useful_flops`).
        products_milliseconds: of the bare matrix products of the useful tokens, in the same run.
        fraction_of_products: these over the step.
        loss: of the first step.
        tokens_useful: prompts once, and every response.
        tokens_computed: that went through the blocks in a step: padding, repeated prompts and the
            reference's forward included.
        ratio_to_peer: the first implementation's time over this one's.
        utilisation: `flops` a second over the GPU's peak; None where it is not known.
        device: by name.
        torch: version.
        trl: version.
    """

    case: str
    model: str
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float
    spread: float
    peak_bytes: int | None
    flops: int
    products_milliseconds: float
    fraction_of_products: float
    loss: float
    tokens_useful: int
    tokens_computed: int
    ratio_to_peer: float | None
    utilisation: float | None
    device: str
    torch: str
    trl: str | None


def usable_trainers(name: str) -> dict[str, Trainer]:
    """Those whose package is here."""
    if importlib.util.find_spec("trl") is not None:
        return dict(TRAINERS[name])
    print("without trl: it is not installed")
    return {key: trainer for key, trainer in TRAINERS[name].items() if key.startswith("fastalign")}


def make_job(
    name: str,
    shape: ModelShape,
    groups: list[Group],
    folder: Path,
    device: str,
    dtype: str,
    num_rounds: int,
) -> Job:
    """Writes models and rows for all trainers of a comparison."""
    write_model(shape, folder / "policy", 0, reward=name == "reward-step")
    if name == "dpo-step":
        write_model(shape, folder / "reference", 1)
    write_rows(groups, folder / "rows.jsonl", "sft" if name == "sft-step" else "preference")
    return Job(
        policy=folder / "policy",
        reference=folder / "reference",
        rows=folder / "rows.jsonl",
        groups=groups,
        shape=shape,
        scratch=folder,
        device=device,
        dtype=dtype,
        num_steps=num_rounds + WARM_UP_TURNS + 1,
        num_threads=torch.get_num_threads(),
    )


def disagreement(
    label: str, implementation: str, loss: float, truth: float, dtype: str
) -> str | None:
    """What is wrong with a loss, or None; ours ends the program."""
    error = abs(loss - truth) / abs(truth)
    if error <= AGREEMENT[dtype]:
        return None
    message = (
        f"{label}: the loss of {implementation} is {loss:.6f}, the eager one {truth:.6f} "
        f"(relative difference {error:.1e})"
    )
    if implementation.startswith("fastalign"):
        raise SystemExit(message)
    return message


def compare_steps(
    name: str,
    case: str,
    shape: ModelShape,
    groups: list[Group],
    device: str,
    dtype: str,
    num_rounds: int,
    trainers: Mapping[str, Trainer],
) -> list[StepRow]:
    """Checks agreement, then measures the trainers' steps and the bare products.

    On a CPU one turn of each a round; on a GPU, whose memory would not hold them together, all
    turns of one after all of another.
    """
    label = f"{case}, {shape.name}, {dtype}"
    products = run_products_without_head if name == "reward-step" else run_products
    everybody = {PRODUCTS: products, **trainers}
    with tempfile.TemporaryDirectory() as path:
        job = make_job(name, shape, groups, Path(path), device, dtype, num_rounds)
        print(f"{label}: the eager loss ...", file=sys.stderr, flush=True)
        truth = TRUTHS[name](job)
        found: dict[str, Turns] = {}
        together = [[key] for key in everybody] if device == "cuda" else [list(everybody)]
        for keys in together:
            chosen = {key: everybody[key] for key in keys}
            found |= measure_turns(label, job, chosen, truth, num_rounds)
    return rows_of(name, case, job, found)


@dataclass
class Turns:
    """What a worker told."""

    loss: float
    num_tokens: int
    seconds: list[float]
    peak_bytes: int | None = None


def measure_turns(
    label: str, job: Job, trainers: Mapping[str, Trainer], truth: float, num_rounds: int
) -> dict[str, Turns]:
    """Starts a process for each, refuses those whose loss is wrong, and interleaves the others."""
    workers: dict[str, Worker] = {}
    try:
        for number, (key, trainer) in enumerate(trainers.items()):
            print(f"{label}: {key} ...", file=sys.stderr, flush=True)
            scratch = job.scratch / f"{key} {number}"
            scratch.mkdir()
            workers[key] = Worker(key, trainer, replace(job, scratch=scratch))
            if key != PRODUCTS:
                fault = disagreement(label, key, workers[key].loss, truth, job.dtype)
                if fault is not None:
                    print(f"not timed: {fault}")
                    workers.pop(key).stop()
        turns = {key: Turns(worker.loss, worker.num_tokens, []) for key, worker in workers.items()}
        for number in range(num_rounds):
            print(f"{label}: round {number + 1} of {num_rounds}", file=sys.stderr, flush=True)
            for key, worker in workers.items():
                seconds, turns[key].peak_bytes = worker.turn()
                turns[key].seconds.append(seconds)
    finally:
        for worker in workers.values():
            worker.stop()
    return turns


def rows_of(name: str, case: str, job: Job, found: dict[str, Turns]) -> list[StepRow]:
    """The table's lines."""
    medians = {key: 1e3 * statistics.median(turns.seconds) for key, turns in found.items()}
    bare = medians[PRODUCTS]
    peer = medians.get(next(iter(TRAINERS[name])))
    flops = useful_flops(job.shape, job.groups, head=name != "reward-step")
    on = device_name(job.device)
    peak_flops = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in on), None)
    if job.dtype != "bfloat16" or job.device != "cuda":
        peak_flops = None
    return [
        StepRow(
            case=case,
            model=job.shape.name,
            implementation=key,
            dtype=job.dtype,
            pass_="optimiser step",
            milliseconds=medians[key],
            spread=1e3 * (max(turns.seconds) - min(turns.seconds)) / medians[key],
            peak_bytes=turns.peak_bytes,
            flops=flops,
            products_milliseconds=bare,
            fraction_of_products=bare / medians[key],
            loss=turns.loss,
            tokens_useful=useful_tokens(job.groups),
            tokens_computed=turns.num_tokens,
            ratio_to_peer=None if peer is None else peer / medians[key],
            utilisation=None if peak_flops is None else 1e3 * flops / medians[key] / peak_flops,
            device=on,
            torch=torch.__version__,
            trl=importlib.metadata.version("trl") if "trl" in found else None,
        )
        for key, turns in found.items()
        if key != PRODUCTS
    ]


def print_steps(rows: Sequence[StepRow]) -> None:
    """The rows, aligned, for a person."""
    print(
        f"{'case':16}{'model':14}{'implementation':34}{'dtype':10}{'ms':>9}{'spread':>8}"
        f"{'peak MiB':>10}{'loss':>10}{'useful':>8}{'computed':>10}{'of products':>13}"
        f"{'of peak':>9}{'ratio':>7}"
    )
    for row in rows:
        peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        ratio = "?" if row.ratio_to_peer is None else f"{row.ratio_to_peer:.2f}"
        of_peak = "?" if row.utilisation is None else f"{row.utilisation:.0%}"
        print(
            f"{row.case:16}{row.model:14}{row.implementation:34}{row.dtype:10}"
            f"{row.milliseconds:9.0f}{row.spread:8.0%}{peak:>10}{row.loss:10.5f}"
            f"{row.tokens_useful:8}{row.tokens_computed:10}{row.fraction_of_products:13.0%}"
            f"{of_peak:>9}{ratio:>7}"
        )


def compare_all_steps(arguments: argparse.Namespace) -> list[StepRow]:
    """Measures every case and model, and prints the table."""
    name, device = arguments.name, arguments.device
    cases = arguments.case or [*DEFAULT_CASES, *(["chat"] if arguments.data else [])]
    if "chat" not in cases:
        print("without chat: it takes a file of preference rows (--data)")
    num_pairs = arguments.pairs or DEFAULT_PAIRS[device]
    trainers = usable_trainers(name)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # here too: the eager loss, and the table
    rows = []
    for dtype in arguments.dtype:
        for model in arguments.model or DEFAULT_SHAPES[device]:
            shape = SHAPES[model]
            for case in cases:
                if case == "chat":
                    groups = read_groups(arguments.data, shape.vocab_size, num_pairs)
                else:
                    groups = make_groups(CASES[case], shape.vocab_size, num_pairs, 2)
                if name == "sft-step":
                    groups = [Group(one.prompt_ids, one.response_ids[:1]) for one in groups]
                rows += compare_steps(
                    name, case, shape, groups, device, dtype, arguments.rounds, trainers
                )
    print_steps(rows)
    return rows
