"""`fastalign generate`: sample completions for a file of prompts."""

from fastalign.cli.answers.sampling import (
    as_lines,
    load_sampled,
    read_prompts,
    sample,
    sample_rows,
)
from fastalign.cli.settings import GenerateConfig
from fastalign.data.columns import RowColumns
from fastalign.data.read import require_columns
from fastalign.written_files import check_file, input_paths, write_file

WRITTEN = ("prompt", "completion", "logprob", "finish_reason", "sample")


def columns_of(names: tuple[str, ...]) -> RowColumns:
    """Return the columns that are named; ValueError for one that is written of its own."""
    for name in names:
        if name in WRITTEN:
            raise ValueError(
                f"data.columns: expected columns besides {', '.join(WRITTEN)}, which are written "
                f"of each completion, got {name!r}"
            )
    return RowColumns(required=names, takers=dict.fromkeys(names, "data.columns"))


def main(config: GenerateConfig) -> int:
    """Run the command; return 0 when the file is written."""
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    columns = columns_of(config.data.columns)
    require_columns(config.data.prompts, columns)
    model, tokenizer = load_sampled(config.model)
    prompts = read_prompts(config.data.prompts, model, tokenizer, config.sampling, columns)
    completions = sample(config.model, model, tokenizer, prompts.prompt_ids, config)
    rows = list(sample_rows(prompts, completions, tokenizer))
    write_file(out, as_lines(rows), overwrite=config.overwrite)
    print(f"{len(rows)} completions of {len(prompts.prompts)} prompts written to {out}")
    return 0
