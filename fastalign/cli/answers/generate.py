"""`fastalign generate`: completions of a file of prompts."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastalign.cli.answers.sampling import (
    SampledModel,
    SamplingRun,
    load_sampled,
    new_file,
    read_prompts,
    sample,
)
from fastalign.cli.config_parse import parse_flags
from fastalign.data import PromptDataset, Tokenizer, content_as_json
from fastalign.rollouts import (
    Completion,
    SamplerName,
    SamplingParams,
    VllmOptions,
    check_sampler,
)


@dataclass(frozen=True)
class GenerateData:
    """Prompts."""

    prompts: str
    """File, folder or hub name with a `prompt` column."""


@dataclass(frozen=True)
class GenerateConfig:
    """Writes one row a completion: prompt, completion, logprob, finish_reason, sample."""

    model: SampledModel
    data: GenerateData
    out: str
    """File (.jsonl) to write."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """What draws completions: the model in this process, vLLM in it, in a process of its own, or a
    server that `fastalign vllm-server` started."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    run: SamplingRun = field(default_factory=SamplingRun)

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.vllm)


def sample_rows(
    prompts: PromptDataset, completions: Sequence[Sequence[Completion]], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """The rows that are written: `logprob` is of the whole completion, in nats."""
    for prompt, answers in zip(prompts.prompts, completions, strict=True):
        for number, answer in enumerate(answers):
            yield {
                "prompt": content_as_json(prompt),
                "completion": tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                "logprob": math.fsum(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "sample": number,
            }


def main(argv: Sequence[str]) -> int:
    """Exit code 0: the file is written."""
    config = parse_flags(GenerateConfig, argv, "fastalign generate")
    out = new_file(config.out)
    model, tokenizer = load_sampled(config.model)
    prompts = read_prompts(config.data.prompts, model, tokenizer, config.sampling)
    completions = sample(config.model, model, tokenizer, prompts.prompt_ids, config)
    rows = list(sample_rows(prompts, completions, tokenizer))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.write_text(text, encoding="utf-8")
    print(f"{len(rows)} completions of {len(prompts.prompts)} prompts written to {out}")
    return 0
