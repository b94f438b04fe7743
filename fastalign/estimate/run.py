"""Estimate the memory of a run, or of each of its ranks, from its configuration and data."""

import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastalign.batch.packed import PackedBatch, pack
from fastalign.batch.schedule import Mixture, indices_of_step, micro_batches
from fastalign.compute import Compute
from fastalign.data.tokenizer import load_tokenizer
from fastalign.estimate.memory import (
    Peak,
    fake_model,
    is_rounded_once,
    peak_of,
    states_bytes,
    trained_model,
    weight_bytes,
)
from fastalign.estimate.ranks import EVALUATION, REFERENCE, TRAINING, shared_run
from fastalign.models.lora import has_adapter
from fastalign.ops.head.buffers import default_budget
from fastalign.ops.head.fused_linear_loss.two_heads import tile_bytes, tile_rows
from fastalign.ops.head.products import accumulation_dtype
from fastalign.ranks.world import World
from fastalign.runs import accumulate as evaluate
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.config import ReferencedConfig, SFTConfig, TrainingConfig, check_teacher
from fastalign.runs.inputs import (
    check_sharing,
    checkpoint_activations,
    examples_per_step,
    indices_of_run,
    load_sets,
    packing_of_run,
    total_steps,
)
from fastalign.runs.open import make_compute
from fastalign.trainers.dpo import reference
from fastalign.trainers.dpo.config import DPOConfig
from fastalign.trainers.kto.config import KTOConfig
from fastalign.trainers.kto.train import with_mismatched
from fastalign.trainers.reward.config import RewardConfig

# Algorithms whose data holds the responses; those that sample are in `estimate.ppo`.
OnRows = SFTConfig | DPOConfig | KTOConfig | RewardConfig

# Freed memory that the allocator cannot reuse at the peak: a share of the activations, or with
# checkpointing a number of layers' activations, since each layer's are allocated and freed in turn.
# Measured with the C library's allocator on a CPU (docs/log.md), where an adapter's small tensors
# between large ones leave three times as much; the values for a GPU are assumptions.
SHARE_KEPT = {"cpu": 0.25, "cuda": 0.05}
LAYERS_KEPT = {"cpu": 2.0, "cuda": 0.5}
TIMES_WITH_ADAPTER = {"cpu": 3.0, "cuda": 1.0}


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of a run.

    Attributes:
        phases: bytes at the peak of each phase on the run's device, by the phase's name.
        libraries: resident bytes before the model is loaded, data included; 0 on a GPU.
        kept: bytes that the allocator holds beyond the live tensors, by the phase's name.
        num_parameters: number of parameters of the trained model, frozen ones included.
        num_trained: number of parameters with a gradient.
        num_tokens: number of packed tokens of the largest batch.
        num_targets: number of predicted tokens of the largest batch.
        num_batches: largest number of batches in a step, all ranks together.
        device: device of the run.
        ranks: number of processes that share the run, of which `phases` are one's; None: alone.
        host: bytes in host memory for each rank (`parallel.offload`).
    """

    phases: dict[str, Peak]
    libraries: int
    kept: dict[str, int]
    num_parameters: int
    num_trained: int
    num_tokens: int
    num_targets: int
    num_batches: int
    device: torch.device
    ranks: int | None = None
    host: int = 0

    def total_of(self, phase: str) -> int:
        """Return all bytes at the peak of a phase."""
        return self.libraries + self.phases[phase].total + self.kept[phase]

    @property
    def largest(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.total_of)


def estimate_run(config: OnRows, ranks: int | None = None) -> Estimate:
    """Estimate a run's memory without loading weights or writing anything.

    `ranks` is the number of processes that share the run; None for a single one.

    Raises:
        ValueError: if the run itself would refuse the model or the data.
        FileNotFoundError: if a file does not exist.
    """
    if isinstance(config, SFTConfig):
        check_teacher(config)
    compute = replace(make_compute(config.train), packing=packing_of_run(config))
    if ranks is not None:
        check_sharing(config)
        compute = replace(compute, world=World(size=ranks), parallel=config.parallel)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model = trained_model(config, compute)
    data, held_out = load_sets(config, model, tokenizer)
    sets = [measure_examples(each.groups, compute.packing) for each in (data, held_out) if each]
    batch, num_batches = fullest(sets[0], steps_of_run(config, data.mixture), compute)
    libraries = resident_bytes() if compute.device.type == "cpu" else 0
    models = (model, teacher_of(config, compute))
    peak = replace(
        step_peak(config, models, batch, compute, backwards=min(num_batches, 2)),
        states=states_bytes(model, config.optim.states),
    )
    phases = {TRAINING: peak}
    kept = {TRAINING: kept_bytes(model, batch, compute, peak.activations)}
    for name, other in forwards(config, models, sets, data.mixture, compute):
        phases[name] = other
        kept[name] = int(SHARE_KEPT[compute.device.type] * other.activations)
    whole_states = peak.states
    host = 0
    if ranks is not None:
        phases, host = shared_run(config, compute, phases, num_batches)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if copies_states(config, compute):
        peak = phases[TRAINING]
        weights = 4 * num_trained * peak.states // whole_states
        phases[TRAINING] = replace(peak, saving=weights + peak.states)
    return Estimate(
        phases=phases,
        ranks=ranks,
        host=host,
        libraries=libraries,
        kept=kept,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=num_trained,
        num_tokens=batch.num_tokens,
        num_targets=batch.num_targets,
        num_batches=num_batches,
        device=compute.device,
    )


def copies_states(config: TrainingConfig, compute: Compute) -> bool:
    """Return whether checkpoints are written, beside the training, from a copy in host memory."""
    train = config.train
    saves = train.save_every or train.save_minutes or train.best_metric
    return bool(saves and train.async_checkpoints and compute.device.type == "cpu")


def steps_of_run(config: TrainingConfig, mixture: Mixture) -> Iterator[list[int]]:
    """Yield the examples of each step."""
    size = examples_per_step(config, mixture.epoch_size)
    for step in range(total_steps(config, mixture.epoch_size)):
        yield indices_of_step(mixture, size, step, seed=config.run.seed)


def kept_bytes(model: Any, batch: PackedBatch, compute: Compute, activations: int) -> int:
    """Return the bytes that the allocator holds beyond live tensors at a training step's peak."""
    times = TIMES_WITH_ADAPTER[compute.device.type] if has_adapter(model) else 1.0
    share = int(times * SHARE_KEPT[compute.device.type] * activations)
    if not model.is_gradient_checkpointing:
        return share
    model.gradient_checkpointing_disable()
    plain = peak_of(model, batch, compute, backwards=1).activations
    checkpoint_activations(model)
    of_layer = plain / model.config.get_text_config().num_hidden_layers
    return max(share, int(times * LAYERS_KEPT[compute.device.type] * of_layer))


def pieces(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the indices in pieces of `size`, which a forward-only phase cuts into batches."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def fullest(
    examples: Examples, parts: Iterable[Sequence[int]], compute: Compute
) -> tuple[PackedBatch, int]:
    """Return the batch with the most tokens, on the device, and the largest number of batches."""
    lengths = examples.lengths
    largest: Sequence[int] = ()
    most_tokens = num_batches = 0
    for indices in parts:
        batches = micro_batches(
            indices,
            lengths,
            tokens_per_batch=compute.tokens_per_batch,
            num_ranks=compute.world.size,
        )
        num_batches = max(num_batches, len(batches))
        for members in batches:
            tokens = sum(lengths[index] for index in members)
            if tokens > most_tokens:
                largest, most_tokens = members, tokens
    groups = [examples.groups[index] for index in largest]
    batch = pack(groups, share_prompts=compute.share_prompts).to(compute.device)
    return batch, num_batches


def forwards(
    config: TrainingConfig,
    models: tuple[Any, Any],
    sets: Sequence[Examples],
    mixture: Mixture,
    compute: Compute,
) -> Iterator[tuple[str, Peak]]:
    """Yield the name and the peak of each phase without gradients.

    `models` are the trained one and its teacher, if there is one.
    """
    model, _ = models
    needed = isinstance(config, DPOConfig) and config.loss.formula().needs_reference
    if isinstance(config, ReferencedConfig) and (needed or isinstance(config, KTOConfig)):
        compared = sets
        if isinstance(config, KTOConfig):  # the reference also reads a mismatched answer to each
            both = (with_mismatched(each.groups, config.run.seed) for each in sets)
            compared = [measure_examples(groups, compute.packing) for groups in both]
        used = [sorted(indices_of_run(config, mixture))]
        used += [list(range(len(held_out.groups))) for held_out in sets[1:]]
        of_sets = (
            fullest(examples, pieces(indices, reference.PIECE), compute)[0]
            for examples, indices in zip(compared, used, strict=True)
        )
        batch = max(of_sets, key=lambda each: each.num_tokens)
        yield REFERENCE, reference_peak(config, model, batch, compute)
    for held_out in sets[1:]:
        parts = pieces(range(len(held_out.groups)), evaluate.PIECE)
        peak = step_peak(config, models, fullest(held_out, parts, compute)[0], compute)
        yield EVALUATION, replace(peak, states=states_bytes(model, config.optim.states))


def reference_peak(
    config: ReferencedConfig, policy: Any, batch: PackedBatch, compute: Compute
) -> Peak:
    """Return the peak of computing the reference's log-probs, with the policy in memory."""
    of_policy = weight_bytes(policy, config)
    path = config.reference.path
    if path is None:
        return replace(peak_of(policy, batch, compute), weights=of_policy)
    model = fake_model(config, compute, path, torch.float32, trained=False)
    peak = peak_of(model, batch, compute)
    held = held_bytes(model, peak, compute, offload=config.reference.offload)
    return replace(peak, weights=held + of_policy)


def held_bytes(frozen: Any, peak: Peak, compute: Compute, *, offload: bool) -> int:
    """Return the bytes of a frozen model's weights on the device, all of which its peak counts."""
    if offload and compute.device.type == "cuda":
        weight = frozen.get_output_embeddings().weight
        return int(weight.numel() * weight.element_size())
    return peak.weights


def teacher_of(config: TrainingConfig, compute: Compute) -> Any:
    """Return the run's teacher on fake tensors; None without one."""
    path = config.teacher.path if isinstance(config, SFTConfig) else None
    if path is None:
        return None
    model = fake_model(config, compute, path, torch.float32, trained=False)
    return model.requires_grad_(False)


def step_peak(
    config: TrainingConfig,
    models: tuple[Any, Any],
    batch: PackedBatch,
    compute: Compute,
    *,
    backwards: int = 0,
) -> Peak:
    """Return the peak of a step with that many backward passes, or of an evaluation.

    `models` are the trained one and its teacher, which computes first and leaves its hidden states;
    None: there is none. Optimiser states are not counted.
    """
    model, teacher = models
    weights = weight_bytes(model, config)
    if teacher is None:
        return replace(peak_of(model, batch, compute, backwards=backwards), weights=weights)
    assert isinstance(config, SFTConfig)
    own, theirs = (each.get_output_embeddings().weight for each in models)
    peak = peak_of(
        model,
        batch,
        compute,
        backwards=backwards,
        logits_bytes=tile_bytes_of_call(len(own), len(theirs), batch.num_targets, compute),
    )
    before = peak_of(teacher, batch, compute, logits_bytes=0)
    left = batch.num_targets * theirs.shape[1] * compute.dtype.itemsize
    sharded = compute.parallel.strategy == "fsdp"  # whose head is copied
    if sharded or (backwards > 1 and is_rounded_once(theirs, compute)):
        left += theirs.numel() * compute.dtype.itemsize
    return replace(
        peak,
        weights=weights + held_bytes(teacher, before, compute, offload=config.teacher.offload),
        activations=max(peak.activations + left, before.activations),
    )


def tile_bytes_of_call(own: int, theirs: int, num_rows: int, compute: Compute) -> int:
    """Return the bytes of the logits, of heads of so many rows, that distillation has at a time."""
    budget = compute.max_buffer_bytes
    if budget is None:
        budget = default_budget(2 * own, compute.dtype, compute.device)
    shape = (max(own, theirs), accumulation_dtype(compute.dtype), compute.device.type)
    return tile_bytes(tile_rows(num_rows, *shape, budget), *shape)


def resident_bytes() -> int:
    """Return this process's resident memory on Linux, 0 elsewhere."""
    table = Path("/proc/self/statm")
    if not table.exists():
        return 0
    return int(table.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
