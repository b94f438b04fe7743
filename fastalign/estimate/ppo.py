"""Estimate the memory of a PPO run: every model that it holds, and the peak of each of its phases.

Completions are counted as long as they may become (`sampling.max_new_tokens`). An engine of vLLM
has memory of its own, which its settings fix; only the sampler `transformers` is counted.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastalign.batch.packed import Group, PackedBatch
from fastalign.compute import Compute
from fastalign.data.load import PromptDataset
from fastalign.data.tokenizer import load_tokenizer
from fastalign.estimate.memory import (
    Peak,
    fake_model,
    move_to_fake,
    peak_of,
    states_bytes,
    trained_model,
    weight_bytes,
)
from fastalign.estimate.run import (
    SHARE_KEPT,
    Estimate,
    copies_states,
    fullest,
    kept_bytes,
    resident_bytes,
    steps_of_run,
)
from fastalign.evaluation.rewards import is_reward_network
from fastalign.models.load import model_without_weights
from fastalign.models.lora import has_adapter
from fastalign.models.lora_files import WEIGHTS_FILE, is_reward_adapter
from fastalign.ranks.world import World
from fastalign.rollouts.transformers_sampler import ROWS_PER_BATCH
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.inputs import (
    add_new_adapter,
    base_dtype,
    checkpoint_activations,
    packing_of_run,
)
from fastalign.runs.open import make_compute
from fastalign.trainers.ppo.config import PolicyGradientConfig, PPOConfig
from fastalign.trainers.ppo.setup import shares_policy, value_source
from fastalign.trainers.sampling.rollout import load_prompt_sets

SAMPLING, NUMBERS = "sampling", "log-probs and values"
POLICY, VALUE = "policy update", "value update"
BYTES_OF_FLOAT32 = 4


@dataclass(frozen=True)
class Held:
    """The models that a run of PPO holds between its computations, on the run's device.

    Attributes:
        policy: the policy on fake tensors, with its adapter.
        value: the value model on fake tensors; None without one of its own.
        weights: bytes of the parameters of all models, each base once.
        trained: number of trained parameters of the policy and of the value model.
        states: bytes of both's optimiser states.
    """

    policy: Any
    value: Any
    weights: int
    trained: tuple[int, int]
    states: int


def estimate_ppo(config: PolicyGradientConfig, ranks: int | None = None) -> Estimate:
    """Estimate a PPO run's memory without loading weights or writing anything.

    `ranks` is the number of processes that share the run by DDP; None for a single one.

    Raises:
        ValueError: if the run itself would refuse a model or the data, or it is sharded.
        FileNotFoundError: if a file does not exist.
    """
    if config.parallel.strategy == "fsdp":
        raise ValueError(
            "parallel.strategy: expected ddp in an estimate of a run that samples; docs/scaling.md "
            "counts FSDP2's shards on paper"
        )
    compute = replace(make_compute(config.train), packing=packing_of_run(config))
    if ranks is not None:
        compute = replace(compute, world=World(size=ranks), parallel=config.parallel)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    held = held_models(config, compute)
    prompts, _ = load_prompt_sets(config.data, config.sampling, [held.policy], tokenizer)
    longest = [[0] * config.sampling.max_new_tokens] * config.sampling.num_samples
    examples = measure_examples(
        [Group(ids, longest) for ids in prompts.prompt_ids], compute.packing
    )
    batch, num_batches = fullest(examples, steps_of_run(config, prompts.mixture), compute)
    libraries = resident_bytes() if compute.device.type == "cpu" else 0
    phases, kept = phases_of(config, held, batch, min(num_batches, 2), compute)
    phases[SAMPLING] = replace(
        Peak(held.weights), states=held.states, activations=sampling_bytes(config, held, prompts)
    )
    kept[SAMPLING] = int(SHARE_KEPT[compute.device.type] * phases[SAMPLING].activations)
    buckets = BYTES_OF_FLOAT32 * sum(held.trained) if compute.world.size > 1 else 0
    if copies_states(config, compute):
        saving = BYTES_OF_FLOAT32 * sum(held.trained) + held.states
        phases[SAMPLING] = replace(phases[SAMPLING], saving=saving)
    return Estimate(
        phases={name: replace(peak, buckets=buckets) for name, peak in phases.items()},
        libraries=libraries,
        kept=kept,
        num_parameters=sum(p.numel() for p in held.policy.parameters()),
        num_trained=sum(held.trained),
        num_tokens=batch.num_tokens,
        num_targets=batch.num_targets,
        num_batches=num_batches,
        device=compute.device,
        ranks=ranks,
    )


def phases_of(
    config: PolicyGradientConfig, held: Held, batch: PackedBatch, backwards: int, compute: Compute
) -> tuple[dict[str, Peak], dict[str, int]]:
    """Return the peaks of a step's phases but sampling, and what the allocator holds beyond."""
    policy, value = held.policy, held.value
    between = Peak(held.weights, states=held.states)
    forward = max(peak_of(m, batch, compute).activations for m in (policy, value) if m is not None)
    phases = {NUMBERS: replace(between, activations=forward)}
    kept = {NUMBERS: int(SHARE_KEPT[compute.device.type] * forward)}
    of_value = 0
    if value is not None:  # its gradients are there while the policy's are computed
        found = peak_of(value, batch, compute, backwards=backwards)
        phases[VALUE] = replace(between, gradients=found.gradients, activations=found.activations)
        kept[VALUE] = kept_bytes(value, batch, compute, found.activations)
        of_value = BYTES_OF_FLOAT32 * held.trained[1]
    found = peak_of(policy, batch, compute, backwards=backwards)
    gradients, activations = found.gradients + of_value, found.activations
    phases[POLICY] = replace(between, gradients=gradients, activations=activations)
    kept[POLICY] = kept_bytes(policy, batch, compute, activations)
    return phases, kept


def held_models(config: PolicyGradientConfig, compute: Compute) -> Held:
    """Build the trained models on fake tensors, and count the bytes of all models."""
    policy = trained_model(config, compute)
    weights = weight_bytes(policy, config)
    path = config.reference.path
    if path is not None or not has_adapter(policy):
        path = path or config.model.path
        other = fake_model(config, compute, path, torch.float32, trained=False)
        weights += stored_bytes(other)
    value, of_value = None, 0
    if config.ppo.advantage.needs_value and not shares_policy(config):
        assert isinstance(config, PPOConfig)
        value = fake_value(config, compute)
        own = [p for p in value.parameters() if p.requires_grad]
        of_value = sum(p.numel() for p in own)
        alone = not config.ppo.one_base
        weights += weight_bytes(value, config) if alone else BYTES_OF_FLOAT32 * of_value
    elif config.ppo.advantage.needs_value:
        of_value = policy.get_output_embeddings().weight.shape[1]  # the head's
    networks = filter(is_reward_network, config.reward.sources)
    weights += sum(reward_bytes(source, config, compute) for source in networks)
    models = [model for model in (policy, value) if model is not None]
    return Held(
        policy=policy,
        value=value,
        weights=weights,
        trained=(sum(p.numel() for p in policy.parameters() if p.requires_grad), of_value),
        states=sum(states_bytes(model, config.optim.states) for model in models),
    )


def fake_value(config: PPOConfig, compute: Compute) -> Any:
    """Return the value model on fake tensors, on a base of its own."""
    path, rank = value_source(config), config.value.lora_rank
    adapter = is_reward_adapter(path)
    if config.ppo.one_base and not adapter:
        rank = rank or config.model.lora.rank
    low = adapter or rank > 0
    with torch.device("meta"):
        model = model_without_weights(
            path,
            compute,
            reward=True,
            dtype=base_dtype(config.model, compute) if low else torch.float32,
            trust_remote_code=config.model.trust_remote_code,
            keep_adapter=adapter,
        )
        if rank:
            add_new_adapter(model, config.model, rank)
    move_to_fake(model, compute.device)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def stored_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(int(t.numel() * t.element_size()) for t in tensors.values())


def reward_bytes(source: str, config: PolicyGradientConfig, compute: Compute) -> int:
    """Return the bytes of a reward model: of its adapter alone where the policy's base is its."""
    if config.ppo.one_base:
        with safe_open(Path(source).expanduser() / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
            sizes = [int(prod(file.get_slice(name).get_shape())) for name in names]
        return BYTES_OF_FLOAT32 * sum(sizes)
    dtype = torch.bfloat16 if compute.device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = model_without_weights(
            source,
            replace(compute, packing="padded"),
            reward=True,
            dtype=dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
    return stored_bytes(model)


def sampling_bytes(config: PolicyGradientConfig, held: Held, prompts: PromptDataset) -> int:
    """Return the bytes of keys and values, and of logits, while completions are drawn together."""
    if config.sampler != "transformers":
        return 0
    text = held.policy.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_samples = config.sampling.num_samples
    at_a_time = min(max(1, ROWS_PER_BATCH // num_samples), config.train.batch_size)
    lengths = sorted((len(ids) for ids in prompts.prompt_ids), reverse=True)
    rows = at_a_time * num_samples
    tokens = sum(lengths[:at_a_time]) + rows * config.sampling.max_new_tokens
    of_keys = 2 * text.num_hidden_layers * heads * width * held.policy.dtype.itemsize
    # float32 logits of each completion, divided by the temperature, and their probabilities
    return int(tokens * of_keys + 3 * BYTES_OF_FLOAT32 * rows * text.vocab_size)
