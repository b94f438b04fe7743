"""How fast a run was, and how steady: time, tokens, memory, gradients, work of the device."""

import math
from collections.abc import Sequence
from statistics import median

from fastalign.report.runs import Row, RunRecord, number

SPEED_COLUMNS = (
    *("run", "steps", "skipped", "s/step", "tokens/s", "peak MiB"),
    *("grad norm", "largest", "model_flops_per_second", "utilisation"),
)
# Dense bfloat16 products a second, in FLOPs, as NVIDIA's data sheets have them.
PEAKS = {
    "NVIDIA A100": 312e12,  # and whatever follows a dash, such as -SXM4-80GB
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def total(run: RunRecord, of: str) -> float:
    """Seconds, or packed tokens, of all steps that say both."""
    rates = [
        (number(r.get("step_seconds")), number(r.get("tokens_per_second"))) for r in run.metrics
    ]
    known = [(s, t) for s, t in rates if s is not None and t is not None and math.isfinite(s * t)]
    return math.fsum(s if of == "seconds" else s * t for s, t in known)


def tokens_per_second(run: RunRecord) -> float | None:
    """Packed tokens of all steps by the time that they took; None: not logged."""
    seconds = total(run, "seconds")
    return total(run, "tokens") / seconds if seconds else None


def model_flops_per_second(run: RunRecord) -> float | None:
    """6·N a token (4·N where the base is frozen), by the tokens a second; None: unknown.

    N are the weights that a token is multiplied by. Attention, what is computed again, and
    references are not counted; a run that samples does other work too, and has no such number.
    """
    speed, weights = tokens_per_second(run), run.num_product_weights
    if speed is None or weights is None or "sampling" in run.config:
        return None
    lora = (run.config.get("model") or {}).get("lora") or {}
    return (4 if lora.get("rank") else 6) * weights * speed


def peak_of(machine: Row) -> float | None:
    """FLOPs a second of all of a run's devices; None: not known, or another dtype's products."""
    if machine.get("products") != "bfloat16":
        return None
    name = str(machine.get("device"))
    if "MIG" in name.split():  # a part of a device
        return None
    found = [peak for known, peak in PEAKS.items() if name == known or name.startswith(known + "-")]
    return found[0] * int(machine.get("num_processes", 1)) if found else None


def utilisation(run: RunRecord) -> float | None:
    """Model FLOPs as a share of the devices' peak; None where one of the two is not known."""
    flops, peak = model_flops_per_second(run), peak_of(run.machine)
    return None if flops is None or peak is None else flops / peak


def speed_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Rows under SPEED_COLUMNS of the runs that logged their tokens a second."""
    return [row_of(run) for run in runs if tokens_per_second(run) is not None]


def row_of(run: RunRecord) -> tuple[str, ...]:
    """One run's numbers; a dash where one is not known."""

    def finite(name: str) -> list[float]:
        return [value for value in run.series(name)[1] if math.isfinite(value)]

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)  # noqa: RUF001 (a dash is meant)

    memory, norms = finite("peak_memory_bytes"), finite("grad_norm")
    return (
        run.name,
        str(len(finite("step_seconds"))),
        str(len(run.skipped_steps)),
        shown(median(finite("step_seconds")), ".2f"),
        shown(tokens_per_second(run), ".0f"),
        shown(max(memory) / 2**20 if memory else None, ".0f"),
        shown(median(norms) if norms else None, ".3g"),
        shown(max(norms) if norms else None, ".3g"),
        shown(model_flops_per_second(run), ".3g"),
        shown(utilisation(run), ".1%"),
    )
