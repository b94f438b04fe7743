"""The table of optimiser steps and its notes."""

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.measure import device_name
from benchmarks.step_work import PEAK_FLOPS, useful_flops, useful_tokens
from benchmarks.step_worker import Job

NOTES = """\
A step is one turn of the trainer's own loop, from the end of one optimizer.step() to the end of the
next: batch, forward, backward, clipping, AdamW, logging. Every first loss was compared with an
eager one. useful: tokens of prompts, counted once, and of responses. computed: tokens that went
through the blocks, with padding, repeated prompts and the reference's forward. of products: time of
the bare matrix products of the useful tokens, in the same run, over the step's. peak MiB: peak
memory of a step, with weights, gradients and optimiser state. careful eager: a loop of our own in
plain PyTorch: padded rows, the head on response tokens alone, reference log-probs known. ratio:
time of TRL's step (or of the step with the fewest answers) over this one's."""
NOTES_ON_TRL = """\
All trainers have the same rows, weights, dtype, learning rates and clipping, each in its own
process. TRL has its defaults except for gradient checkpointing, which is off for all. TRL's DPO
step runs the reference model unless its log-probs are precomputed, as fastalign does; in the row
"reference in the step" fastalign also computes them in every step. TRL's head computes the logits
of every position on a CPU, and only those of predicted tokens on a GPU."""


@dataclass(frozen=True)
class StepRow:
    """One line of the table; the JSON file is a list of these.

    Attributes:
        case: name of the rows' lengths.
        model: name of the model's shape.
        implementation: name of the trainer.
        dtype: dtype of the products.
        pass_: what is timed.
        milliseconds: median time of the turns.
        spread: (slowest - fastest) / median.
        peak_bytes: peak memory of the timed turns, the model included: resident memory beyond that
            before the model was built, or the CUDA allocator's; None if not reported.
        flops: FLOPs that no implementation can avoid (`useful_flops`).
        products_milliseconds: time of the bare matrix products of the useful tokens.
        fraction_of_products: `products_milliseconds` over `milliseconds`.
        loss: loss of the first step.
        tokens_useful: tokens of prompts, counted once, and of responses.
        tokens_computed: tokens that went through the blocks in a step, with padding, repeated
            prompts and the reference's forward.
        ratio_to_peer: the peer's time over this one's.
        utilisation: `flops` per second over the GPU's bfloat16 peak; None if unknown.
        device: name of the device.
        torch: version of torch.
        trl: version of TRL if it was run.
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


@dataclass
class Turns:
    """The results of a worker.

    Attributes:
        job: job of the worker.
        loss: loss of its first step.
        num_tokens: number of tokens that went through the blocks in a turn.
        seconds: seconds of each timed turn.
        peak_bytes: peak memory of all timed turns.
    """

    job: Job
    loss: float
    num_tokens: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def milliseconds(self) -> float:
        """Median time of the turns."""
        return 1e3 * statistics.median(self.seconds)


def peak_flops(job: Job, device: str) -> float | None:
    """Return the GPU's peak FLOPs per second in bfloat16, or None if unknown."""
    if job.device != "cuda" or job.dtype != "bfloat16":
        return None
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in device), None)


def rows_of(
    case: str, found: Mapping[str, Turns], products: Mapping[str, Turns], peer: str, *, head: bool
) -> list[StepRow]:
    """Return the rows of the table.

    Args:
        case: name of the rows' lengths.
        found: turns by implementation.
        products: turns of the bare products by implementation.
        peer: implementation that the ratios refer to.
        head: whether the model has a language-model head.
    """
    rows = []
    for name, turns in found.items():
        job, milliseconds = turns.job, turns.milliseconds
        flops = useful_flops(job.shape, job.groups, head=head)
        device = device_name(job.device)
        peak = peak_flops(job, device)
        bare = products[name].milliseconds
        rows.append(
            StepRow(
                case=case,
                model=job.shape.name,
                implementation=name,
                dtype=job.dtype,
                pass_="optimiser step",
                milliseconds=milliseconds,
                spread=1e3 * (max(turns.seconds) - min(turns.seconds)) / milliseconds,
                peak_bytes=turns.peak_bytes,
                flops=flops,
                products_milliseconds=bare,
                fraction_of_products=bare / milliseconds,
                loss=turns.loss,
                tokens_useful=useful_tokens(job.groups),
                tokens_computed=turns.num_tokens,
                ratio_to_peer=found[peer].milliseconds / milliseconds if peer in found else None,
                utilisation=None if peak is None else 1e3 * flops / milliseconds / peak,
                device=device,
                torch=torch.__version__,
                trl=importlib.metadata.version("trl") if "trl" in found else None,
            )
        )
    return rows


def print_steps(rows: Sequence[StepRow]) -> None:
    """Print the rows as a table."""
    print(
        f"{'case':14}{'model':14}{'implementation':34}{'dtype':9}{'ms':>9}{'spread':>8}"
        f"{'peak MiB':>10}{'loss':>10}{'useful':>8}{'computed':>10}{'of products':>13}"
        f"{'of peak':>9}{'ratio':>7}"
    )
    for row in rows:
        peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        ratio = "?" if row.ratio_to_peer is None else f"{row.ratio_to_peer:.2f}"
        of_peak = "?" if row.utilisation is None else f"{row.utilisation:.0%}"
        print(
            f"{row.case:14}{row.model:14}{row.implementation:34}{row.dtype:9}"
            f"{row.milliseconds:9.0f}{row.spread:8.0%}{peak:>10}{row.loss:10.5f}"
            f"{row.tokens_useful:8}{row.tokens_computed:10}{row.fraction_of_products:13.0%}"
            f"{of_peak:>9}{ratio:>7}"
        )


# Trainers that do the same work: the reference in no step, or in every one.
LIKE_FOR_LIKE = {
    "fastalign": ("trl, reference precomputed", "careful eager"),
    "fastalign, reference in the step": ("trl",),
}


def print_like_for_like(rows: Sequence[StepRow]) -> None:
    """Print how trainers that do the same work compare."""
    by_name = {(row.case, row.model, row.dtype, row.implementation): row for row in rows}
    pairs = [(row, name) for row in rows for name in LIKE_FOR_LIKE.get(row.implementation, ())]
    for row, name in pairs:
        peer = by_name.get((row.case, row.model, row.dtype, name))
        if peer:
            memory = ""
            if row.peak_bytes is not None and peer.peak_bytes is not None:
                memory = f", {row.peak_bytes / peer.peak_bytes:.2f} times its memory"
            print(
                f"like for like, {row.case}, {row.model}, {row.dtype}: {row.implementation}: "
                f"{peer.milliseconds / row.milliseconds:.2f} times as fast as {name}{memory}"
            )


def print_notes(rows: Sequence[StepRow]) -> None:
    """Print the notes on the table."""
    print(NOTES)
    if any(row.trl for row in rows):
        print(NOTES_ON_TRL)
