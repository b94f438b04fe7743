"""What a run, or each of its ranks, will need in memory by phase: from configuration and data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastalign.batch.packed import PackedBatch, pack
from fastalign.batch.schedule import indices_of_step, micro_batches
from fastalign.compute import Compute
from fastalign.data import load_tokenizer
from fastalign.estimate.memory import Peak, peak_of_forward, peak_of_step, states_bytes
from fastalign.estimate.model import reference_model, trained_model, weight_bytes
from fastalign.estimate.ranks import (
    EVALUATION,
    REFERENCE,
    TRAINING,
    SharedRun,
    compute_of_rank,
    shared_run,
)
from fastalign.models import has_adapter
from fastalign.runs import accumulate as evaluate
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.config import AnyConfig
from fastalign.runs.data import load_sets
from fastalign.runs.load_models import checkpoint_activations
from fastalign.runs.loop import indices_of_run, total_steps
from fastalign.runs.memory import resident_bytes
from fastalign.runs.open import make_compute
from fastalign.trainers.dpo import reference
from fastalign.trainers.dpo.config import DPOConfig
from fastalign.trainers.reward.config import RewardConfig
from fastalign.trainers.sft import SFTConfig

# What trains on rows that are there before the run, responses and all.
OnRows = SFTConfig | DPOConfig | RewardConfig


# Freed pages that the allocator cannot use again at the fullest moment, as a share of activations;
# and where they are checkpointed, in activations of a layer, each layer's being made and freed in
# between. Measured with the C library's on a CPU (docs/log.md), where an adapter's small tensors
# between large ones leave three times as much; of a GPU's it is an assumption.
SHARE_KEPT = {"cpu": 0.25, "cuda": 0.05}
LAYERS_KEPT = {"cpu": 2.0, "cuda": 0.5}
TIMES_WITH_ADAPTER = {"cpu": 3.0, "cuda": 1.0}


@dataclass(frozen=True)
class Estimate:
    """A run's memory.

    Attributes:
        phases: name to the bytes alive at its fullest moment, on the run's device.
        libraries: resident before the model is loaded, data included; 0 on a GPU.
        kept: of each phase, what the allocator keeps beyond what is alive.
        num_parameters: of the policy or reward model, frozen ones included.
        num_trained: those with a gradient.
        num_tokens: packed tokens of the largest batch.
        num_targets: rows of its head.
        num_batches: of the step that has most of them, all ranks together.
        device: where.
        shared: what ranks make of it: `phases` are then a rank's.
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
    shared: SharedRun | None = field(default=None)

    def total_of(self, phase: str) -> int:
        """Everything at the fullest moment of a phase."""
        return self.libraries + self.phases[phase].total + self.kept[phase]

    @property
    def largest(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=self.total_of)


def estimate_run(config: OnRows, ranks: int | None = None) -> Estimate:
    """Estimates a run's memory without loading weights or writing anything.

    Args:
        config: of the run.
        ranks: that share the run; None: it is one process's.

    Raises:
        ValueError: whatever the run itself would refuse of model and data.
        FileNotFoundError: a file that is not there.
    """
    compute = make_compute(config.train)
    if ranks is not None:
        compute = compute_of_rank(config, compute, ranks)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model = trained_model(config, compute)
    data, held_out = load_sets(config, model, tokenizer)
    sets = [measure_examples(each.groups, compute.packing) for each in (data, held_out) if each]
    steps = steps_of_run(config, len(data.groups))
    batch, num_batches = fullest(sets[0], steps, compute)
    libraries = resident_bytes() if compute.device.type == "cpu" else 0
    peak = peak_of_step(model, batch, compute, states=config.optim.states, several=num_batches > 1)
    peak = replace(peak, weights=weight_bytes(model, config))
    phases = {TRAINING: peak}
    kept = {TRAINING: kept_bytes(model, batch, compute, peak.activations)}
    for name, other in forwards(config, model, sets, compute):
        phases[name] = other
        kept[name] = int(SHARE_KEPT[compute.device.type] * other.activations)
    whole_states = peak.states
    shared = None if ranks is None else shared_run(config, compute, phases, num_batches)
    phases = phases if shared is None else shared.phases
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if copies_to_save(config, compute):
        peak = phases[TRAINING]
        weights = 4 * num_trained * peak.states // whole_states
        phases[TRAINING] = replace(peak, saving=weights + peak.states)
    return Estimate(
        phases=phases,
        shared=shared,
        libraries=libraries,
        kept=kept,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=num_trained,
        num_tokens=batch.num_tokens,
        num_targets=batch.num_targets,
        num_batches=num_batches,
        device=compute.device,
    )


def copies_to_save(config: AnyConfig, compute: Compute) -> bool:
    """Whether a copy of the state lies beside it in a step: on a CPU, where checkpoints go."""
    writes_beside = bool(config.train.save_every) and config.train.async_checkpoints
    return writes_beside and compute.device.type == "cpu"


def kept_bytes(model: Any, batch: PackedBatch, compute: Compute, activations: int) -> int:
    """What the allocator keeps beyond what is alive at a training step's fullest moment."""
    times = TIMES_WITH_ADAPTER[compute.device.type] if has_adapter(model) else 1.0
    share = int(times * SHARE_KEPT[compute.device.type] * activations)
    if not model.is_gradient_checkpointing:
        return share
    model.gradient_checkpointing_disable()
    plain = peak_of_step(model, batch, compute, states="float32", several=False).activations
    checkpoint_activations(model)
    of_layer = plain / model.config.num_hidden_layers
    return max(share, int(times * LAYERS_KEPT[compute.device.type] * of_layer))


def steps_of_run(config: AnyConfig, num_examples: int) -> Iterator[list[int]]:
    """The examples of each step."""
    for step in range(total_steps(config, num_examples)):
        yield indices_of_step(num_examples, config.train.batch_size, step, seed=config.run.seed)


def pieces(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The indices, as many at a time as a forward-only phase cuts into batches together."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def fullest(
    examples: Examples, parts: Iterable[Sequence[int]], compute: Compute
) -> tuple[PackedBatch, int]:
    """The batch with most tokens, on the device, and the most batches that a part is cut into."""
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
    config: AnyConfig, model: Any, sets: Sequence[Examples], compute: Compute
) -> Iterator[tuple[str, Peak]]:
    """The fullest moments of what is computed without gradients, by name.

    Args:
        config: of the run.
        model: from `trained_model`.
        sets: training data, and held-out data if there are any.
        compute: how forwards are run.
    """
    if isinstance(config, DPOConfig) and config.loss.formula().needs_reference:
        used = [sorted(indices_of_run(config, len(sets[0].groups)))]
        used += [list(range(len(held_out.groups))) for held_out in sets[1:]]
        of_sets = (
            fullest(examples, pieces(indices, reference.PIECE), compute)[0]
            for examples, indices in zip(sets, used, strict=True)
        )
        batch = max(of_sets, key=lambda each: each.num_tokens)
        yield REFERENCE, reference_peak(config, model, batch, compute)
    for held_out in sets[1:]:
        parts = pieces(range(len(held_out.groups)), evaluate.PIECE)
        peak = peak_of_forward(model, fullest(held_out, parts, compute)[0], compute)
        states = states_bytes(model, config.optim.states)
        yield EVALUATION, replace(peak, weights=weight_bytes(model, config), states=states)


def reference_peak(config: DPOConfig, policy: Any, batch: PackedBatch, compute: Compute) -> Peak:
    """The fullest moment of computing the reference's log-probs, the policy beside it."""
    of_policy = weight_bytes(policy, config)
    path = config.reference.path
    if path is None:
        return replace(peak_of_forward(policy, batch, compute), weights=of_policy)
    model = reference_model(config, compute, path)
    peak = peak_of_forward(model, batch, compute)
    held = peak.weights
    if config.reference.offload and compute.device.type == "cuda":
        weight = model.get_output_embeddings().weight
        held = weight.numel() * weight.element_size()
    return replace(peak, weights=held + of_policy)
