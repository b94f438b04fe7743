"""`fastalign generate`: sample completions for a file of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastalign.cli.answers.sampling import (
    SampledModel,
    SamplingConfig,
    as_lines,
    load_sampled,
    read_prompts,
    sample,
    sample_rows,
)
from fastalign.cli.config_parse import parse_flags
from fastalign.written_files import check_file, input_paths, write_file


@dataclass(frozen=True)
class GenerateData:
    """The prompts."""

    prompts: str
    """File, folder or hub name with a `prompt` column."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Write a row per completion: prompt, completion, logprob, finish_reason, sample."""

    model: SampledModel
    data: GenerateData
    out: str
    """File (.jsonl) to write."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 when the file is written."""
    config = parse_flags(GenerateConfig, argv, "fastalign generate")
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    model, tokenizer = load_sampled(config.model)
    prompts = read_prompts(config.data.prompts, model, tokenizer, config.sampling)
    completions = sample(config.model, model, tokenizer, prompts.prompt_ids, config)
    rows = list(sample_rows(prompts, completions, tokenizer))
    write_file(out, as_lines(rows), overwrite=config.overwrite)
    print(f"{len(rows)} completions of {len(prompts.prompts)} prompts written to {out}")
    return 0
