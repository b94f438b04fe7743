"""Functions of the commands that sample: load a model, read prompts, sample, write rows."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from fastalign.cli.settings import SampledModel, SamplingConfig
from fastalign.data.columns import RowColumns, as_text
from fastalign.data.conversation import content_as_json
from fastalign.data.load import PromptDataset, load_prompts
from fastalign.data.read import NO_COLUMNS
from fastalign.data.tokenizer import (
    Tokenizer,
    eos_token_ids,
    foreign_ids_line,
    load_tokenizer,
    num_foreign_ids,
)
from fastalign.models.architecture import num_positions
from fastalign.models.load import load_policy
from fastalign.models.lora import adapter_rank
from fastalign.rollouts import (
    Completion,
    EngineSpec,
    PolicyAccess,
    Sampler,
    SamplingParams,
    TransformersSampler,
    open_engine,
)


def load_sampled(config: SampledModel) -> tuple[Any, Tokenizer]:
    """Load a model, in float32 on a CPU and bfloat16 on a GPU, and its tokenizer."""
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
    source: str,
    model: Any,
    tokenizer: Tokenizer,
    params: SamplingParams,
    columns: RowColumns = NO_COLUMNS,
) -> PromptDataset:
    """Read prompts that leave room for their answers, with these columns of their rows.

    Raises:
        ValueError: if a row is bad, or a prompt is too long.
    """
    limit = num_positions(model.config) or 2**31
    room = limit - params.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--sampling.max-new-tokens: expected less than the model's {limit} positions, got "
            f"{params.max_new_tokens}"
        )
    advice = f"the model has {limit} positions; shorten it, or lower --sampling.max-new-tokens"
    prompts = load_prompts(source, tokenizer, max_length=room, advice=advice, columns=columns)
    prompts.report.print_losses()
    return prompts


class Progress:
    """Prints the number of finished completions every fifth of `total`."""

    def __init__(self, total: int):
        self._total, self._done, self._shown = total, 0, 0

    def add(self, count: int) -> None:
        """Add finished completions; engines report 0 to show that they work."""
        self._done += count
        if count and (self._done == self._total or self._done - self._shown >= self._total / 5):
            self._shown = self._done
            print(f"sampled {self._done} of {self._total}")

    def restart(self) -> None:
        """Start again from 0, when all completions are drawn again."""
        self._done = self._shown = 0


def open_sampler(
    source: SampledModel,
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    settings: SamplingConfig,
) -> Sampler:
    """Open the sampler that `--sampler` names for a loaded model.

    Raises:
        ValueError: if vLLM is not installed, or cannot run this model or these settings.
        SamplerFailed: if an engine does not start, or no server answers in time.
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
    spec = EngineSpec(
        model.config,
        eos_token_ids=stops,
        dtype=model.dtype,
        max_length=max(len(ids) for ids in prompt_ids) + params.max_new_tokens,
        options=settings.vllm,
        lora_rank=adapter_rank(model),
    )
    return open_engine(
        settings.sampler,
        spec,
        PolicyAccess(model),
        on_progress=progress.add,
        on_rebuild=progress.restart,
    )


def sample(
    source: SampledModel,
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    settings: SamplingConfig,
) -> list[list[Completion]]:
    """Return completions of each prompt, printing the progress."""
    with closing(open_sampler(source, model, tokenizer, prompt_ids, settings)) as sampler:
        found = sampler.generate(prompt_ids, settings.sampling, seed=settings.run.seed)
    number = num_foreign_ids(tokenizer, (a.token_ids for answers in found for a in answers))
    if number:
        print(foreign_ids_line(tokenizer, number))
    return found


def sample_rows(
    prompts: PromptDataset, completions: Sequence[Sequence[Completion]], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield a row per completion; `logprob` is that of the whole completion in nats.

    It has the columns of the prompt's row that were read.
    """
    columns = prompts.columns or [{}] * len(prompts)
    for prompt, values, answers in zip(prompts.prompts, columns, completions, strict=True):
        for number, answer in enumerate(answers):
            yield {
                **values,
                "prompt": content_as_json(prompt),
                "completion": tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                "logprob": math.fsum(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "sample": number,
            }


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as JSON Lines; dates and decimals become text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=as_text) + "\n" for row in rows)
