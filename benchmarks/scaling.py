"""Memory of models too large for one GPU: `python -m benchmarks.scaling` rewrites docs/scaling.md.

The text between the document's two marks is the output of `tables`: arithmetic, not measurements.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from fastalign.batch.packed import Group, PackedBatch, pack
from fastalign.compute import Compute
from fastalign.estimate.memory import move_to_fake, peak_of
from fastalign.estimate.ranks import (
    ModelWeights,
    gathered,
    kept,
    reducing,
    weights_of,
)
from fastalign.models import attention
from fastalign.models.lora import add_adapter
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import World
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import checkpoint_activations
from fastalign.runs.open import make_compute

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m benchmarks.scaling -->", "<!-- end -->"
GIGABYTE = 10**9
ROOM = 76  # of 80 GB: the rest is the allocator's, NCCL's and CUDA's own
GPUS = (1, 8, 64)
BATCHES = 64  # of a step, all ranks together
SIZES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
VOCABULARY, HEAD_WIDTH, LORA_RANK = 128256, 128, 16
# A batch: pairs of 512 tokens after prompts of 512, and at most 1 GiB of logits at a time.
NUM_PAIRS, LENGTH, LOGITS = 5, 512, 2**30
FEW = 2  # layers of the small model from which the activations of a deep one are extrapolated

FSDP = ParallelConfig(strategy="fsdp")
OFFLOAD = ParallelConfig(strategy="fsdp", offload=True)
# Label: the trained model and the parallel settings; of PPO also whether the trainer samples.
SETTINGS: dict[str, tuple[str, ParallelConfig]] = {
    "ddp": ("policy", ParallelConfig()),
    "fsdp": ("policy", FSDP),
    "fsdp, no_sync": ("policy", ParallelConfig(strategy="fsdp", no_sync=True)),
    "fsdp, layers stay": ("policy", ParallelConfig(strategy="fsdp", reshard_after_forward=False)),
    "fsdp, offload": ("policy", OFFLOAD),
    "LoRA, ddp": ("adapter", ParallelConfig()),
    "LoRA, fsdp": ("adapter", FSDP),
}
PPO_SETTINGS: dict[str, tuple[str, ParallelConfig, bool]] = {
    "ppo, ddp": ("policy", ParallelConfig(), True),
    "ppo, fsdp": ("policy", FSDP, True),
    "ppo, fsdp, vllm-server": ("policy", FSDP, False),
    "ppo, fsdp, offload, vllm-server": ("policy", OFFLOAD, False),
    "ppo, LoRA policy, fsdp": ("adapter", FSDP, True),
    "ppo, LoRA policy, fsdp, vllm-server": ("adapter", FSDP, False),
}


def make(size: str, kind: str, *, num_layers: int | None = None, gathered: bool = False) -> Any:
    """Return a model on the meta device.

    Args:
        size: key of `SIZES`.
        kind: `policy`, `adapter`, `reference`, `reward` or `frozen reward`.
        num_layers: number of layers if not that of the size.
        gathered: hold all weights in bf16, as layers compute with them under FSDP2.
    """
    attention.register()
    shape = SIZES[size] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=shape["hidden_size"] // HEAD_WIDTH,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        num_labels=1,
        **shape,
    )
    of_tokens = AutoModelForSequenceClassification if "reward" in kind else AutoModelForCausalLM
    low = gathered or kind == "adapter"
    with torch.device("meta"):
        model = of_tokens.from_config(
            config,
            dtype=torch.bfloat16 if low else torch.float32,
            attn_implementation=attention.registered_name("sdpa"),
        ).eval()
        if kind == "adapter":
            add_adapter(model, rank=LORA_RANK, alpha=2 * LORA_RANK, targets=("all-linear",))
    if kind in ("reference", "frozen reward"):
        model.requires_grad_(False)
    return model


@cache
def weights(size: str, kind: str) -> ModelWeights:
    """Return a model's weights as a rank keeps them: float32, an adapter's base in bf16."""
    return weights_of(make(size, kind))


def shared_by(ranks: int, settings: ParallelConfig) -> Compute:
    """Return the means of computing of a rank of a run in bf16."""
    return Compute(dtype=torch.bfloat16, world=World(size=ranks), parallel=settings)


@cache
def batch() -> PackedBatch:
    """Return a batch of 7,680 tokens, 5,120 of them predicted."""
    groups = [Group([1] * LENGTH, [[2] * LENGTH, [3] * LENGTH])] * NUM_PAIRS
    return pack(groups, share_prompts=True)


@cache
def activations_of(size: str, kind: str, *, checkpointed: bool, gathered: bool = True) -> int:
    """Return the bytes of a batch's activations and the head's buffers.

    The first layers are counted as `fastalign estimate` does. Each further layer adds what the last
    of them added; with checkpointing at most its input, and autocast's bf16 copies of weights that
    are not gathered in bf16.
    """
    few = peak(size, kind, FEW, checkpointed, gathered)
    more = SIZES[size]["num_hidden_layers"] - FEW
    if not checkpointed:
        return few + more * (peak(size, kind, FEW + 1, checkpointed, gathered) - few)
    layer = weights(size, kind).layers[0]
    wide = [w.numel() for w in layer if not gathered and w.element_size() > 2]
    element = 4 if wide else 2
    given = batch().num_tokens * SIZES[size]["hidden_size"] * element
    return few + more * (given + 2 * sum(wide))


@cache
def peak(size: str, kind: str, num_layers: int, checkpointed: bool, gathered: bool) -> int:
    """Return the bytes of activations of a model with `num_layers` layers."""
    compute = make_compute(TrainConfig(device="cpu", precision="bf16", max_buffer_bytes=LOGITS))
    model = make(size, kind, num_layers=num_layers, gathered=gathered)
    move_to_fake(model, compute.device)
    if checkpointed:
        checkpoint_activations(model)
    return peak_of(model, batch(), compute, backwards=1).activations


def step_bytes(size: str, kind: str, settings: ParallelConfig, ranks: int) -> int:
    """Return the bytes on a GPU in a training step of sft, dpo or reward."""
    model, compute = weights(size, kind), shared_by(ranks, settings)
    own = 0 if settings.offload else kept(model, compute, batches=BATCHES // ranks).total
    passing = gathered(model, compute) + reducing(model, compute)
    sharded = settings.strategy == "fsdp"
    return own + passing + activations_of(size, kind, checkpointed=True, gathered=sharded)


def ppo_bytes(
    size: str, kind: str, settings: ParallelConfig, samples: bool, ranks: int
) -> tuple[int, int]:
    """Return the bytes on a GPU and in host memory in a step of PPO.

    The peak is an update of the policy, or its gathering to sample if the trainer samples.
    """
    compute, batches = shared_by(ranks, settings), BATCHES // ranks
    policy = weights(size, kind)
    trained = [kept(model, compute, batches=batches) for model in (policy, weights(size, "reward"))]
    frozen = ["frozen reward"] + (["reference"] if kind != "adapter" else [])
    own = sum(each.total for each in trained)
    own += sum(kept(weights(size, name), compute).weights for name in frozen)
    update = gathered(policy, compute) + reducing(policy, compute)
    sharded = settings.strategy == "fsdp"
    update += activations_of(size, kind, checkpointed=True, gathered=sharded)
    sampling = gathered(policy, compute, whole=True) if samples else 0
    if not settings.offload:
        sampling -= sum(each.gradients for each in trained)  # there are none yet
    on_gpu, on_host = (0, own) if settings.offload else (own, 0)
    return on_gpu + max(update, sampling), on_host


def number(num_bytes: float) -> str:
    """Return gigabytes with about three digits."""
    value = num_bytes / GIGABYTE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def rows(size: str) -> Iterator[str]:
    """Yield the lines of a size's table: memory of a GPU, bold where it fits."""
    names = [f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in GPUS]
    yield f"| {size}, GB of a GPU | {' | '.join(names)} |"
    yield "|---" + "|---:" * len(GPUS) + "|"
    steps = {f"sft, dpo: {name}": each for name, each in SETTINGS.items()}
    for name, (kind, settings) in SETTINGS.items():
        if kind == "policy":
            steps[f"reward: {name}"] = ("reward", settings)
    cells = {name: [step_bytes(size, *each, n) for n in GPUS] for name, each in steps.items()}
    for name, ppo in PPO_SETTINGS.items():
        cells[name] = [ppo_bytes(size, *ppo, n)[0] for n in GPUS]
    for name, sizes in cells.items():
        shown = [f"**{number(n)}**" if n <= ROOM * GIGABYTE else number(n) for n in sizes]
        yield f"| {name} | {' | '.join(shown)} |"


def parts_table() -> Iterator[str]:
    """Yield the lines of a table of what takes a GPU's memory under fsdp."""
    yield "| GB of a GPU, fsdp | weights | gradients | AdamW | gathered | reducing | activations |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for size in SIZES:
        model = weights(size, "policy")
        for ranks in GPUS:
            compute = shared_by(ranks, FSDP)
            own = kept(model, compute)
            sizes = [own.weights, own.gradients, own.states]
            sizes += [gathered(model, compute), reducing(model, compute)]
            sizes += [activations_of(size, "policy", checkpointed=True)]
            values = " | ".join(map(number, sizes))
            yield f"| {size}, {ranks} GPU{'s' * (ranks > 1)} | {values} |"


def models_table() -> Iterator[str]:
    """Yield the lines of a table of each model: size, activations, and what is offloaded."""
    hosts = " | ".join(f"ppo, {ranks} GPU{'s' * (ranks > 1)}" for ranks in GPUS)
    yield f"| | parameters | activations | checkpointed | offloaded, all ranks | {hosts} |"
    yield "|---" + "|---:" * 7 + "|"
    for size in SIZES:
        model = weights(size, "policy")
        num_parameters = sum(weight.numel() for weight in model.all)
        values = [f"{num_parameters / GIGABYTE:.2f} billion"]
        for checkpointed in (False, True):
            values.append(number(activations_of(size, "policy", checkpointed=checkpointed)))
        values.append(number(kept(model, shared_by(1, OFFLOAD)).total))
        values += [number(ppo_bytes(size, "policy", OFFLOAD, False, ranks)[1]) for ranks in GPUS]
        yield f"| {size} | {' | '.join(values)} |"


@cache
def tables() -> str:
    """Return all tables of the document."""
    found = [models_table(), parts_table(), *map(rows, SIZES)]
    return "\n\n".join("\n".join(lines) for lines in found)


def with_tables(document: str) -> str:
    """Return the document with new tables."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
