"""The sampler of a policy in training: its own forwards, or an engine kept at its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastalign.compute import Compute
from fastalign.data.tokenizer import Tokenizer, eos_token_ids
from fastalign.models.lora import adapter_rank
from fastalign.ranks.whole_weights import with_whole_weights
from fastalign.rollouts import (
    Completion,
    EngineSpec,
    OverlappedSampler,
    RankZeroSampler,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    TransformersSampler,
    access_to,
    open_engine,
)
from fastalign.runs.metrics import Metrics
from fastalign.trainers.sampling.config import SampledTrainingConfig


@contextmanager
def sampling_mode(model: Any, compute: Compute) -> Iterator[None]:
    """Set the model to eval mode, with its products in the run's dtype, while it is sampled from.

    Gradient checkpointing, which forbids a cache of keys and values, is off in eval mode; compiled
    layers run as they were, since a cache of another length would compile them anew.
    """
    training = model.training
    model.eval()
    try:
        with compute.autocast(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


class PolicySampler:
    """The embedded sampler on the policy that is being trained; its weights are always the newest.

    `path` is the model's folder, whose generation settings may list more end tokens.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, path: str, compute: Compute):
        stops = eos_token_ids(tokenizer, path)
        pad = tokenizer.pad_token_id
        self._model, self._compute = model, compute
        self._sampler = TransformersSampler(
            model, eos_token_ids=stops, pad_token_id=stops[0] if pad is None else pad
        )
        self.version = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """See `Sampler`; several ranks share the prompts, and each gets all completions."""
        self._sampler.version = self.version
        world = self._compute.world
        mine = world.part_of(len(prompt_ids))

        def sample() -> list[list[Completion]]:
            return self._sampler.generate(
                prompt_ids[mine.start : mine.stop], params, seed=seed, first_prompt=mine.start
            )

        with sampling_mode(self._model, self._compute):
            found = with_whole_weights(self._model, sample)
        return [answers for of_rank in world.gather(found) for answers in of_rank]

    def metrics(self) -> Metrics:
        """Return no metrics, since there is no engine of its own."""
        return {}

    def close(self) -> None:
        """Release the model."""
        self._sampler.close()


AnySampler = PolicySampler | SyncedSampler | OverlappedSampler | RankZeroSampler


def overlapped(sampler: AnySampler) -> OverlappedSampler | RankZeroSampler | None:
    """Return the sampler if it samples a step while the one before trains, else None."""
    if isinstance(sampler, RankZeroSampler):
        return sampler if sampler.overlaps else None
    return sampler if isinstance(sampler, OverlappedSampler) else None


def open_policy_sampler(
    config: SampledTrainingConfig, model: Any, tokenizer: Tokenizer, compute: Compute
) -> AnySampler:
    """Open the sampler that `--sampler` names on the policy that is being trained.

    Raises:
        ValueError: if vLLM is not installed, or cannot run this model or these settings.
        SamplerFailed: if an engine does not start, or no server answers in time.
    """
    path = config.model.path
    if config.sampler == "transformers":
        return PolicySampler(model, tokenizer, path, compute)
    world = compute.world
    if config.sampler == "vllm" and (world.size > 1 or compute.parallel.strategy == "fsdp"):
        raise ValueError(
            "sampler: vllm in the trainer's process goes with one rank and whole weights; expected "
            "vllm-server or transformers with several ranks or --parallel.strategy fsdp"
        )
    policy = access_to(model, partial(sampling_mode, model, compute), world)

    def opened() -> SyncedSampler | OverlappedSampler:
        spec = EngineSpec(
            model.config,
            eos_token_ids=eos_token_ids(tokenizer, path),
            dtype=compute.dtype,
            max_length=config.data.max_length + config.sampling.max_new_tokens,
            options=config.vllm,
            lora_rank=adapter_rank(model),
        )
        sampler = open_engine(config.sampler, spec, policy)
        return OverlappedSampler(sampler) if config.vllm.overlap else sampler

    if world.size == 1:
        return opened()
    found: list[SyncedSampler | OverlappedSampler] = []
    world.first_does(lambda: found.append(opened()), (SamplerFailed, ValueError, OSError))
    return RankZeroSampler(found[0] if found else None, policy, world)
