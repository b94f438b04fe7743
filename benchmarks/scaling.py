"""Models too large for one GPU, on paper: `python -m benchmarks.scaling` rewrites docs/scaling.md.

What stands between the document's two marks is what `tables` returns: nothing is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.scaling_models import MODELS, SIZES, activations_of, weights
from fastalign.estimate.scaling import Kept, Sharing, gathered, kept, numbers, reducing
from fastalign.estimate.traffic import (
    PPOModelWeights,
    PPOWork,
    Traffic,
    forward_traffic,
    gradient_traffic,
    ppo_traffic,
)
from fastalign.ranks.config import ParallelConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m benchmarks.scaling -->", "<!-- end -->"
GIGABYTE = 10**9
ROOM = 76  # of 80 GB: the rest is the allocator's, NCCL's and CUDA's own
GPUS = (1, 8, 64)
BATCHES = 64  # of a step, all ranks together
EPOCHS = 4
BF16 = 2

FSDP = ParallelConfig(strategy="fsdp")
OFFLOAD = ParallelConfig(strategy="fsdp", offload=True)
DDP = ParallelConfig()
# What is trained, and how ranks share it.
SETTINGS: dict[str, tuple[str, ParallelConfig]] = {
    "ddp": ("policy", DDP),
    "fsdp": ("policy", FSDP),
    "fsdp, no_sync": ("policy", ParallelConfig(strategy="fsdp", no_sync=True)),
    "fsdp, layers stay": ("policy", ParallelConfig(strategy="fsdp", reshard_after_forward=False)),
    "fsdp, offload": ("policy", OFFLOAD),
    "LoRA, ddp": ("adapter", DDP),
    "LoRA, fsdp": ("adapter", FSDP),
}
# What is trained, how it is shared, whether the trainer samples.
PPO_SETTINGS: dict[str, tuple[str, ParallelConfig, bool]] = {
    "ddp": ("policy", DDP, True),
    "fsdp": ("policy", FSDP, True),
    "fsdp, vllm-server": ("policy", FSDP, False),
    "fsdp, offload, vllm-server": ("policy", OFFLOAD, False),
    "LoRA policy, fsdp": ("adapter", FSDP, True),
    "LoRA policy, fsdp, vllm-server": ("adapter", FSDP, False),
}


@dataclass(frozen=True)
class Cell:
    """Of one setting on one number of GPUs.

    Attributes:
        kept: bytes between computations.
        passing: what is gathered and reduced, and activations.
        host: in host memory.
        sent: by a rank in a step.
    """

    kept: int
    passing: int
    host: int
    sent: int

    @property
    def total(self) -> float:
        """On the GPU."""
        return (self.kept + self.passing) / GIGABYTE


def placed(own: Kept, sharing: Sharing) -> tuple[int, int]:
    """Bytes on the GPU and on the host."""
    return (0, own.total) if sharing.settings.offload else (own.total, 0)


def step_cell(size: str, kind: str, settings: ParallelConfig, ranks: int) -> Cell:
    """A training step of sft, dpo or reward."""
    model, sharing = weights(size, kind), Sharing(ranks, BF16, settings)
    batches = BATCHES // ranks
    on_gpu, on_host = placed(kept(model, sharing, batches=batches), sharing)
    passing = gathered(model, sharing) + reducing(model, sharing)
    passing += activations_of(size, kind, checkpointed=True, gathered=sharing.sharded)
    traffic = gradient_traffic(model, sharing, batches)
    return Cell(on_gpu, passing, on_host, traffic.sent(ranks))


def ppo_cell(size: str, kind: str, settings: ParallelConfig, samples: bool, ranks: int) -> Cell:
    """A step of PPO; the fullest moment is an update, or where the policy is whole to sample."""
    sharing, batches = Sharing(ranks, BF16, settings), BATCHES // ranks
    policy, value = weights(size, kind), weights(size, "reward")
    frozen = weights(size, "frozen reward")
    reference = None if kind == "adapter" else weights(size, "reference")
    trained = kept(policy, sharing, batches=batches) + kept(value, sharing, batches=batches)
    still = Kept(sum(kept(m, sharing).weights for m in (frozen, reference) if m is not None))
    on_gpu, on_host = placed(trained + still, sharing)
    update = gathered(policy, sharing) + reducing(policy, sharing)
    update += activations_of(size, kind, checkpointed=True, gathered=sharing.sharded)
    sampling = gathered(policy, sharing, whole=True) if samples else 0
    if not settings.offload:
        sampling -= trained.gradients  # there are none yet
    work = PPOWork(EPOCHS, batches, batches, batches, samples)
    models = PPOModelWeights(policy, reference, value, frozen)
    traffic: Traffic = ppo_traffic(models, sharing, work)
    return Cell(on_gpu, max(update, sampling), on_host, traffic.sent(ranks))


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def row(name: str, cells: list[Cell]) -> str:
    """A line of a table: memory of a GPU, bold where it fits, and what is sent."""
    parts = []
    for ranks, cell in zip(GPUS, cells, strict=True):
        memory = number(cell.total)
        parts.append(f"**{memory}**" if cell.total <= ROOM else memory)
        if ranks > 1:
            parts.append(number(cell.sent / GIGABYTE))
    return f"| {name} | {' | '.join(parts)} |"


def heading(first: str) -> list[str]:
    """A table's first lines."""
    names = []
    for ranks in GPUS:
        names += [f"{ranks} GPU{'s' * (ranks > 1)}"] + ["sent"] * (ranks > 1)
    return [f"| {first} | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]


def step_table(size: str, *, reward: bool) -> Iterator[str]:
    """Training steps of one size."""
    yield from heading("reward, GB" if reward else "sft and dpo, GB")
    for name, (kind, settings) in SETTINGS.items():
        if reward and kind == "adapter":
            continue
        of = "reward" if reward else kind
        yield row(name, [step_cell(size, of, settings, ranks) for ranks in GPUS])


def ppo_table(size: str) -> Iterator[str]:
    """PPO of one size."""
    yield from heading("ppo, GB")
    for name, (kind, settings, samples) in PPO_SETTINGS.items():
        yield row(name, [ppo_cell(size, kind, settings, samples, ranks) for ranks in GPUS])


def parts_table() -> Iterator[str]:
    """Where the memory goes in one setting."""
    yield "| GB of a GPU, fsdp | weights | gradients | AdamW | gathered | reducing | activations |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for size in SIZES:
        model = weights(size, "policy")
        for ranks in GPUS:
            sharing = Sharing(ranks, BF16, FSDP)
            own = kept(model, sharing)
            sizes = [own.weights, own.gradients, own.states]
            sizes += [gathered(model, sharing), reducing(model, sharing)]
            sizes += [activations_of(size, "policy", checkpointed=True)]
            values = " | ".join(number(each / GIGABYTE) for each in sizes)
            yield f"| {size}, {ranks} GPU{'s' * (ranks > 1)} | {values} |"


def other_table() -> Iterator[str]:
    """What does not depend on the number of GPUs, or happens once."""
    yield (
        "| | parameters | activations | checkpointed | reference's pass: sent a batch, "
        + "8 GPUs | 64 GPUs | offloaded in all |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for size in SIZES:
        model, reference = weights(size, "policy"), weights(size, "reference")
        values = [f"{numbers(model.all) / GIGABYTE:.2f} billion"]
        for checkpointed in (False, True):
            found = activations_of(size, "policy", checkpointed=checkpointed)
            values.append(number(found / GIGABYTE))
        for ranks in GPUS[1:]:
            traffic = forward_traffic(reference, Sharing(ranks, BF16, FSDP))
            values.append(number(traffic.sent(ranks) / GIGABYTE))
        values.append(number(kept(model, Sharing(1, BF16, OFFLOAD)).total / GIGABYTE))
        yield f"| {size} | {' | '.join(values)} |"
    yield ""
    yield "| ppo with offload, GB in host memory for each GPU | 1 GPU | 8 GPUs | 64 GPUs |"
    yield "|---|---:|---:|---:|"
    for size in SIZES:
        cells = [ppo_cell(size, "policy", OFFLOAD, False, ranks) for ranks in GPUS]
        yield f"| {size} | {' | '.join(number(cell.host / GIGABYTE) for cell in cells)} |"


@cache
def tables() -> str:
    """Every table of the document."""
    lines = [*other_table(), "", *parts_table()]
    for size in SIZES:
        lines += ["", f"### {MODELS[size]}", "", *step_table(size, reward=False)]
        lines += ["", *step_table(size, reward=True), "", *ppo_table(size)]
    return "\n".join(lines)


def with_tables(document: str) -> str:
    """The document with its tables as they are now."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
