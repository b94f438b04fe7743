"""What the commands that sample share: a model on its device, and its samples."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastalign.compute import Compute, Packing, find_device
from fastalign.data import (
    PromptDataset,
    Tokenizer,
    eos_token_ids,
    load_prompts,
    load_tokenizer,
)
from fastalign.models import load_policy
from fastalign.rollouts import (
    Completion,
    Sampler,
    SamplerName,
    SamplingParams,
    TransformersSampler,
    VllmOptions,
    open_engine,
)


@dataclass(frozen=True)
class SampledModel:
    """The model that is sampled from."""

    path: str
    """Folder in transformers' layout, or a hub name."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""

    def compute(self, packing: Packing = "shared_prefix") -> Compute:
        """Return how this model's forwards run: on its device, in the dtype of its weights."""
        return Compute(find_device(self.device, "model.device"), packing=packing)


@dataclass(frozen=True)
class SamplingRun:
    """Randomness."""

    seed: int = 0
    """Of the samples; the same seed draws the same tokens, however they are batched."""


class SamplingSettings(Protocol):
    """The settings of a command that samples."""

    @property
    def sampling(self) -> SamplingParams:
        """How completions are drawn."""

    @property
    def run(self) -> SamplingRun:
        """With which seed."""

    @property
    def sampler(self) -> SamplerName:
        """By what."""

    @property
    def vllm(self) -> VllmOptions:
        """Settings of the engine."""


def load_sampled(config: SampledModel) -> tuple[Any, Tokenizer]:
    """The model, in float32 on a CPU and bfloat16 on a GPU, and its tokenizer."""
    compute = config.compute("padded")
    tokenizer = load_tokenizer(config.path, trust_remote_code=config.trust_remote_code)
    model = load_policy(
        config.path,
        compute,
        dtype=torch.bfloat16 if compute.device.type == "cuda" else torch.float32,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def read_prompts(
    source: str, model: Any, tokenizer: Tokenizer, params: SamplingParams
) -> PromptDataset:
    """Prompts that leave room for their answers.

    Raises:
        ValueError: a bad row, or a prompt that is too long.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    room = limit - params.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max-new-tokens: the model has {limit} positions, got {params.max_new_tokens}"
        )
    return load_prompts(source, tokenizer, max_length=room)


class Progress:
    """Says now and then how many of `total` completions are done."""

    def __init__(self, total: int):
        self._total, self._done, self._shown = total, 0, 0

    def add(self, count: int) -> None:
        """So many more are done; engines say 0 to show that they live."""
        self._done += count
        if count and (self._done == self._total or self._done - self._shown >= self._total / 5):
            self._shown = self._done
            print(f"sampled {self._done} of {self._total}", flush=True)

    def restart(self) -> None:
        """All of them are drawn again."""
        self._done = self._shown = 0


def open_sampler(
    source: SampledModel,
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    settings: SamplingSettings,
) -> Sampler:
    """What `--sampler` names, on a loaded model.

    Raises:
        ValueError: vLLM is not installed, or cannot run this model or these settings.
        SamplerFailed: an engine did not start, or no server is there in time.
    """
    stops, params = eos_token_ids(tokenizer, source.path), settings.sampling
    progress = Progress(len(prompt_ids) * params.num_samples)
    if settings.sampler == "transformers":
        return TransformersSampler(
            model,
            eos_token_ids=stops,
            pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            on_progress=progress.add,
        )
    return open_engine(
        settings.sampler,
        model,
        eos_token_ids=stops,
        dtype=model.dtype,
        max_length=max(len(ids) for ids in prompt_ids) + params.max_new_tokens,
        options=settings.vllm,
        on_progress=progress.add,
        on_rebuild=progress.restart,
    )


def sample(
    source: SampledModel,
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    settings: SamplingSettings,
) -> list[list[Completion]]:
    """Completions of each prompt; says now and then how many are done.

    Raises:
        ValueError: as `open_sampler`, or what the sampler refuses.
        SamplerFailed: the engine failed, or computes with other weights than the model's.
    """
    with closing(open_sampler(source, model, tokenizer, prompt_ids, settings)) as sampler:
        return sampler.generate(prompt_ids, settings.sampling, seed=settings.run.seed)


def new_file(out: str) -> Path:
    """The path to write, its folder made.

    Raises:
        ValueError: it exists: nothing is overwritten.
    """
    path = Path(out)
    if path.exists():
        raise ValueError(f"out: {path} exists; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
