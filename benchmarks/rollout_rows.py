"""The table of samplers: its columns, and what they leave to be said."""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.measure import device_name
from benchmarks.rollout_samplers import PEER, RolloutJob

NOTES = """\
generate: one call that answers all prompts, each with the same number of tokens and none with an
EOS, drawn from the whole distribution at temperature 1. sync: from the policy's new weights to an
engine that has them. All have the same prompts and weights and one setting of threads, each in a
process of its own, open at once on a CPU and in turns. Before and after, each sampler's likeliest
tokens were compared with the policy's. peak MiB: resident memory of all processes of a sampler, the
policy, its libraries and an engine's cache included; on a GPU the allocator's. ratio: the time of
transformers' `generate` over this one's. Log-probs are returned by fastalign's samplers alone.
transformers' continuous batching has a cache of the batch's size on a CPU, of its own choice on a
GPU."""


@dataclass(frozen=True)
class RolloutRow:
    """One line of the table; the JSON file is a list of these.

    Attributes:
        case: model, prompts and lengths.
        implementation: whose sampler.
        dtype: of weights and products.
        pass_: `generate` or `sync`.
        milliseconds: median of the rounds; None where it was not timed.
        spread: (slowest - fastest) / median.
        peak_bytes: most memory in the timed calls: resident, of all of a sampler's processes with
            what they import, or the CUDA allocator's; None where the system cannot tell, or a GPU
            is used by more than one process.
        tokens: made by a call.
        tokens_per_second: by the median.
        ratio_to_peer: the peer's time over this one's.
        bytes: that a sync hands over.
        bytes_per_second: by the median.
        reason: why it was not timed.
        device: by name.
        torch: version.
        transformers: version.
        vllm: version, where it is installed.
    """

    case: str
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float | None
    spread: float | None
    peak_bytes: int | None
    tokens: int | None
    tokens_per_second: float | None
    ratio_to_peer: float | None
    bytes: int | None
    bytes_per_second: float | None
    reason: str | None
    device: str
    torch: str
    transformers: str
    vllm: str | None


@dataclass
class Times:
    """Measurements of one sampler's process.

    Attributes:
        num_bytes: bytes that a sync moves; None if the sampler has no sync.
        generate: seconds of each timed call.
        sync: likewise.
        peak_bytes: in all of them.
        reason: why it was not timed, or not to the end.
    """

    num_bytes: int | None = None
    generate: list[float] = field(default_factory=list)
    sync: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reason: str | None = None


def rows_of(job: RolloutJob, found: Mapping[str, Times]) -> list[RolloutRow]:
    """Return the table's rows: `generate` of every sampler, then the syncs that there are."""
    peer = found.get(PEER)
    rows = [_row(job, name, "generate", times, peer) for name, times in found.items()]
    synced = {name: times for name, times in found.items() if times.sync}
    return rows + [_row(job, name, "sync", times, None) for name, times in synced.items()]


def _row(job: RolloutJob, name: str, pass_: str, times: Times, peer: Times | None) -> RolloutRow:
    timed: list[float] = [] if times.reason is not None else getattr(times, pass_)
    seconds = statistics.median(timed) if timed else None
    samples, usable_peer = pass_ == "generate", peer is not None and peer.reason is None
    tokens = job.case.num_tokens if samples else None
    num_bytes = None if samples else times.num_bytes
    vllm = None
    if importlib.util.find_spec("vllm") is not None:
        # The command line imports tyro, which no other comparison needs.
        from fastalign.cli.doctor import vllm_line

        vllm = vllm_line()
    return RolloutRow(
        case=job.case.name,
        implementation=name,
        dtype=job.dtype,
        pass_=pass_,
        milliseconds=None if seconds is None else 1e3 * seconds,
        spread=None if seconds is None else (max(timed) - min(timed)) / seconds,
        peak_bytes=times.peak_bytes if samples else None,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        ratio_to_peer=(
            statistics.median(peer.generate) / seconds if peer and usable_peer and seconds else None
        ),
        bytes=num_bytes,
        bytes_per_second=num_bytes / seconds if num_bytes and seconds else None,
        reason=times.reason,
        device=device_name(job.device),
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        vllm=vllm,
    )


def print_rollouts(rows: Sequence[RolloutRow]) -> None:
    """Print the rows as an aligned table."""
    print(
        f"{'case':14}{'pass':10}{'implementation':34}{'dtype':9}{'ms':>9}{'spread':>8}"
        f"{'peak MiB':>10}{'tokens/s':>10}{'ratio':>7}{'MB':>8}{'MB/s':>8}"
    )
    for row in rows:
        line = f"{row.case:14}{row.pass_:10}{row.implementation:34}{row.dtype:9}"
        if row.milliseconds is None:
            print(f"{line}not timed: {row.reason}")
            continue
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
        ratio = "" if row.ratio_to_peer is None else f"{row.ratio_to_peer:.2f}"
        size = "" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
        rate = "" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e6:.0f}"
        print(
            f"{line}{row.milliseconds:9.1f}{row.spread:8.0%}{peak:>10}{speed:>10}{ratio:>7}"
            f"{size:>8}{rate:>8}"
        )
    print(NOTES)
