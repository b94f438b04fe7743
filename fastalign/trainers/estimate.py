"""What a run will need in memory, phase by phase, from its configuration and its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.batch import PackedBatch, pack
from fastalign.data import (
    TokenizedDataset,
    indices_of_step,
    load_tokenizer,
    micro_batches,
)
from fastalign.models import add_adapter, has_adapter
from fastalign.models.skeleton import model_without_weights
from fastalign.trainers import dpo, reward, sft
from fastalign.trainers.config import AnyConfig, DPOConfig, RewardConfig, SFTConfig
from fastalign.trainers.loop import indices_of_run, total_steps
from fastalign.trainers.memory import Peak, fake_mode, peak_of_forward, peak_of_step
from fastalign.trainers.process_memory import resident_bytes
from fastalign.trainers.setup import check_lengths, checkpoint_activations
from fastalign.trainers.step import Compute, Examples, make_compute, measure_examples

# Freed pages that the allocator cannot use again at the fullest moment, as a share of activations;
# and where they are checkpointed, in activations of a layer, each layer's being made and freed in
# between. Measured with the C library's on a CPU (docs/log.md), where an adapter's small tensors
# between large ones leave three times as much; of a GPU's it is an assumption.
SHARE_KEPT = {"cpu": 0.25, "cuda": 0.05}
LAYERS_KEPT = {"cpu": 2.0, "cuda": 0.5}
TIMES_WITH_ADAPTER = {"cpu": 3.0, "cuda": 1.0}
# A quantised weight: half a byte, and a float32 scale for each 64 of them.
NF4_BYTES = 0.5 + 4 / 64


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
        num_batches: of the step that has most of them.
        device: where.
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

    def total_of(self, phase: str) -> int:
        """Everything at the fullest moment of a phase."""
        return self.libraries + self.phases[phase].total + self.kept[phase]

    @property
    def largest(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=self.total_of)


def estimate_run(config: AnyConfig) -> Estimate:
    """Estimates a run's memory without loading weights or writing anything.

    Raises:
        ValueError: whatever the run itself would refuse of model and data.
        FileNotFoundError: a file that is not there.
    """
    compute = make_compute(config.train)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    data = load_data(config, tokenizer)
    model = build_model(config, compute)
    check_lengths(model, data)
    examples = measure_examples(data.groups, compute.packing)
    batch, num_batches = largest_batch(config, examples, compute)
    libraries = resident_bytes() if compute.device.type == "cpu" else 0
    peak = peak_of_step(model, batch, compute, states=config.optim.states, several=num_batches > 1)
    phases = {"training step": replace_weights(peak, model, config)}
    kept = {"training step": kept_bytes(model, batch, compute, peak.activations)}
    if isinstance(config, DPOConfig) and config.loss.formula().needs_reference:
        of_reference = reference_peak(config, model, examples, compute)
        phases["reference log-probs"] = of_reference
        kept["reference log-probs"] = int(
            SHARE_KEPT[compute.device.type] * of_reference.activations
        )
    return Estimate(
        phases=phases,
        libraries=libraries,
        kept=kept,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_tokens=batch.num_tokens,
        num_targets=batch.num_targets,
        num_batches=num_batches,
        device=compute.device,
    )


def load_data(config: AnyConfig, tokenizer: Any) -> TokenizedDataset:
    """The training data, as the run itself reads it."""
    if isinstance(config, DPOConfig):
        return dpo.load_data(config, config.data.train, tokenizer)
    if isinstance(config, RewardConfig):
        return reward.load_data(config, config.data.train, tokenizer)
    assert isinstance(config, SFTConfig)
    return sft.load_data(config, config.data.train, tokenizer)


def build_model(config: AnyConfig, compute: Compute, path: str | None = None) -> Any:
    """The trained model, or with a path the reference, of tensors without data."""
    lora = config.model.lora
    trained = path is None
    low = trained and lora.base == "bf16"
    with torch.device("meta"):  # peft moves its matrices, which fake tensors do not bear
        model = model_without_weights(
            config.model.path if path is None else path,
            reward=isinstance(config, RewardConfig),
            dtype=torch.bfloat16 if low else torch.float32,
            device=compute.device,
            packing=compute.packing,
            attention_name=compute.attention,
            compute_dtype=compute.dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
        if trained and lora.rank:
            add_adapter(
                model,
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora.targets,
                use_rslora=lora.use_rslora,
            )
    with fake_mode(compute.device):
        model.to_empty(device=compute.device)
        model.tie_weights()
    if trained and config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


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


def largest_batch(
    config: AnyConfig, examples: Examples, compute: Compute
) -> tuple[PackedBatch, int]:
    """The run's batch with most tokens, on the device, and the most batches that a step has."""
    num_examples, lengths = len(examples.groups), examples.lengths
    largest: Sequence[int] = ()
    most_tokens = num_batches = 0
    for step in range(total_steps(config, num_examples)):
        indices = indices_of_step(num_examples, config.train.batch_size, step, seed=config.run.seed)
        batches = micro_batches(indices, lengths, tokens_per_batch=compute.tokens_per_batch)
        num_batches = max(num_batches, len(batches))
        for members in batches:
            tokens = sum(lengths[index] for index in members)
            if tokens > most_tokens:
                largest, most_tokens = members, tokens
    return packed(examples, largest, compute), num_batches


def packed(examples: Examples, members: Sequence[int], compute: Compute) -> PackedBatch:
    """Those examples as one batch on the device."""
    groups = [examples.groups[index] for index in members]
    return pack(groups, share_prompts=compute.packing != "packed").to(compute.device)


def reference_peak(config: DPOConfig, policy: Any, examples: Examples, compute: Compute) -> Peak:
    """The fullest moment of computing the reference's log-probs, the policy beside it."""
    lengths = examples.lengths
    used = sorted(indices_of_run(config, len(examples.groups)))
    batches = micro_batches(used, lengths, tokens_per_batch=compute.tokens_per_batch)
    largest = max(batches, key=lambda members: sum(lengths[index] for index in members))
    batch = packed(examples, largest, compute)
    path = config.reference.path
    if path is None:
        return replace_weights(peak_of_forward(policy, batch, compute), policy, config)
    model = build_model(config, compute, path)
    peak = peak_of_forward(model, batch, compute)
    held = peak.weights
    if config.reference.offload and compute.device.type == "cuda":
        weight = model.get_output_embeddings().weight
        held = weight.numel() * weight.element_size()
    return Peak(
        weights=held + weight_bytes(policy, config),
        gradients=0,
        states=0,
        activations=peak.activations,
    )


def replace_weights(peak: Peak, model: Any, config: AnyConfig) -> Peak:
    """The peak with the weights as they will be kept: nf4 is not built here."""
    return Peak(weight_bytes(model, config), peak.gradients, peak.states, peak.activations)


def weight_bytes(model: Any, config: AnyConfig) -> int:
    """Of parameters and buffers, once each."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    if config.model.lora.base == "nf4":
        head = model.get_output_embeddings()
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                weight = layer.weight
                if not weight.requires_grad:
                    total -= weight.numel() * (weight.element_size() - NF4_BYTES)
    return int(total)
