"""Who is compared: fastalign's samplers, and transformers' two ways to sample by themselves."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_cases import RolloutCase
from benchmarks.step_cases import EOS, PAD
from fastalign.rollouts import (
    EngineSpec,
    SamplingParams,
    TransformersSampler,
    VllmOptions,
    VllmSampler,
    VllmServerSampler,
    policy_tensors,
)

Prompts = Sequence[Sequence[int]]
PAGE_TOKENS = 16  # of continuous batching's cache on a CPU
BLOCK_TOKENS = 128  # of vLLM's
OURS = "fastalign"


@dataclass(frozen=True)
class RolloutJob:
    """A sampler's task.

    Attributes:
        case: model, prompts and lengths.
        folder: of the policy.
        scratch: folder of the sampler's own.
        device: `cpu` or `cuda`.
        dtype: by torch's name.
        num_threads: of a CPU.
    """

    case: RolloutCase
    folder: Path
    scratch: Path
    device: str
    dtype: str
    num_threads: int


@dataclass(frozen=True)
class Contestant:
    """A sampler that is open.

    Attributes:
        generate: token ids of an answer to each prompt, from prompts and how they are drawn.
        sync: hands the policy's weights over, as a version; None: it samples from the policy.
        processes: others than this one that it runs in.
        close: ends it.
    """

    generate: Callable[[Prompts, SamplingParams, int], list[list[int]]]
    sync: Callable[[int], None] | None = None
    processes: tuple[int, ...] = ()
    close: Callable[[], None] = lambda: None


Opener = Callable[[RolloutJob, Any], Contestant]


def generation_config(params: SamplingParams) -> Any:
    """Return transformers' configuration of the same distribution, ended by length alone."""
    from transformers import GenerationConfig

    drawn = params.temperature > 0
    return GenerationConfig(
        do_sample=drawn,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=-1,
        pad_token_id=PAD,
        **({"top_k": 0, "top_p": 1.0, "temperature": params.temperature} if drawn else {}),
    )


def open_generate(job: RolloutJob, model: Any) -> Contestant:
    """Open the peer: `generate` of transformers, which returns no log-probs."""

    def generate(prompts: Prompts, params: SamplingParams, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts, device=model.device)
        config = generation_config(params)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return answers

    return Contestant(generate)


def open_continuous_batching(job: RolloutJob, model: Any) -> Contestant:
    """Open transformers' `generate_batch`; on a CPU its cache holds the batch and no more.

    By itself it would take most of the memory that is free there, and go through all of it in
    every step.
    """
    from transformers import ContinuousBatchingConfig

    case = job.case
    pages = -(-(case.prompt_length + case.new_tokens) // PAGE_TOKENS) + 1
    sizes = {
        "page_size": PAGE_TOKENS,
        "num_blocks": case.num_prompts * pages,
        "max_batch_tokens": case.num_prompts * case.prompt_length,
    }
    own = copy.deepcopy(model)  # it changes its model's attention

    def generate(prompts: Prompts, params: SamplingParams, seed: int) -> list[list[int]]:
        settings = ContinuousBatchingConfig(**(sizes if job.device == "cpu" else {}), seed=seed)
        found = own.generate_batch(
            [list(ids) for ids in prompts],
            generation_config=generation_config(params),
            continuous_batching_config=settings,
        )
        if len(found) != len(prompts):
            raise RuntimeError(f"generate_batch answered {len(found)} of {len(prompts)} prompts")
        return [list(answer.generated_tokens) for answer in found.values()]

    return Contestant(generate)


def open_embedded(job: RolloutJob, model: Any) -> Contestant:
    """Open the default sampler."""
    sampler = TransformersSampler(model, eos_token_ids=[EOS], pad_token_id=PAD)
    return Contestant(_answers_of(sampler))


def open_in_process(job: RolloutJob, model: Any) -> Contestant:
    """Open an engine of vLLM in this process."""
    return contestant_of(VllmSampler(engine_spec(job, model)), model)


def open_server(job: RolloutJob, model: Any) -> Contestant:
    """Start a server of vLLM for this measurement."""
    sampler = VllmServerSampler(engine_spec(job, model))
    return replace(contestant_of(sampler, model), processes=family_of(sampler.process_id))


def family_of(process: int) -> tuple[int, ...]:
    """Return the ids of a process and of all its descendants, on Linux."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it is gone
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return tuple(found)


def engine_spec(job: RolloutJob, model: Any) -> EngineSpec:
    """One engine for all ways to vLLM; on a CPU its cache has room for the batch."""
    case, shape = job.case, job.case.shape
    length = case.prompt_length + case.new_tokens
    blocks = case.num_prompts * -(-length // BLOCK_TOKENS) + 8
    values = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim
    num_bytes = 4 * values * BLOCK_TOKENS * blocks
    return EngineSpec(
        model.config,
        eos_token_ids=[EOS],
        dtype=getattr(torch, job.dtype),
        max_length=length,
        options=VllmOptions(
            kv_cache_gib=num_bytes / 2**30, start_seconds=180, max_sequences=case.num_prompts
        ),
    )


def _answers_of(sampler: Any) -> Callable[[Prompts, SamplingParams, int], list[list[int]]]:
    def generate(prompts: Prompts, params: SamplingParams, seed: int) -> list[list[int]]:
        found = sampler.generate(prompts, params, seed=seed)
        return [answers[0].token_ids for answers in found]

    return generate


def contestant_of(sampler: Any, model: Any) -> Contestant:
    """Return an open engine, with the model as its policy."""

    def sync(version: int) -> None:
        sampler.sync_weights(policy_tensors(model), version)

    return Contestant(_answers_of(sampler), sync, close=sampler.close)


PEER = "transformers generate"
PEERS: dict[str, Opener] = {
    PEER: open_generate,
    "transformers continuous batching": open_continuous_batching,
}
EMBEDDED: dict[str, Opener] = {f"{OURS} transformers": open_embedded}
ENGINES: dict[str, Opener] = {
    f"{OURS} vllm": open_in_process,
    f"{OURS} vllm-server": open_server,
}


def usable_samplers() -> tuple[dict[str, Opener], dict[str, str]]:
    """Those whose packages are here, and why the others are not compared."""
    if importlib.util.find_spec("vllm") is not None:
        return {**PEERS, **EMBEDDED, **ENGINES}, {}
    return {**PEERS, **EMBEDDED}, dict.fromkeys(ENGINES, "vllm is not installed")
