"""`fastalign win-rate`: how often one model's answers are better than another's."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastalign.cli.answers.sampling import (
    load_sampled,
    read_prompts,
    sample,
)
from fastalign.cli.settings import SampledModel, Side, WinRateConfig
from fastalign.compute import Compute, find_device
from fastalign.data.columns import RowColumns, as_lists
from fastalign.data.conversation import content_as_json
from fastalign.data.examples import Content
from fastalign.data.read import NO_COLUMNS, load_samples, require_columns
from fastalign.evaluation.judge.chat_endpoint import ChatEndpoint
from fastalign.evaluation.judge.judge import judge_by_endpoint, judge_statistics, read_template
from fastalign.evaluation.rewards import columns_of, load_reward
from fastalign.evaluation.win_rate import (
    AnswerPair,
    Judged,
    judge_by_reward,
    pair_answers,
    win_rate,
)
from fastalign.written_files import check_file, input_paths, write_file


def check(config: WinRateConfig) -> None:
    """Raise ValueError unless each side has one source and there is exactly one judge."""
    for name, side in (("model", config.model), ("baseline", config.baseline)):
        if (side.path is None) == (side.samples is None):
            got = "neither" if side.path is None else "both"
            raise ValueError(f"{name}: expected {name}.path or {name}.samples, got {got}")
        if side.path is not None and config.data.prompts is None:
            raise ValueError(f"data.prompts: {name}.path needs prompts to sample from, got none")
    if config.data.prompts is not None and config.model.samples and config.baseline.samples:
        raise ValueError("data.prompts: both sides are files of samples, nothing is sampled")
    if (config.reward is None) == (config.judge.endpoint is None):
        got = "neither" if config.reward is None else "both"
        raise ValueError(f"judge: expected reward or judge.endpoint, got {got}")


@dataclass(frozen=True)
class SideAnswers:
    """One side's answers, parallel with the columns of their rows that a reward takes.

    Attributes:
        texts: answers of each prompt.
        columns: for each answer, those of the sample's row, or of the prompt's row.
    """

    texts: dict[Content, list[str]]
    columns: dict[Content, list[Mapping[str, object]]]

    def columns_at(self, pairs: Sequence[AnswerPair]) -> dict[str, list[object]]:
        """Return the columns of this side's answers of the pairs."""
        return as_lists([self.columns[pair.prompt][pair.sample] for pair in pairs])


def answers_of(side: Side, config: WinRateConfig, columns: RowColumns = NO_COLUMNS) -> SideAnswers:
    """Return the answers of a side, read or sampled; the model is freed afterwards."""
    if side.samples is not None:
        samples = load_samples(side.samples, columns)
        return SideAnswers(
            {prompt: [sample.completion for sample in found] for prompt, found in samples.items()},
            {prompt: [sample.columns for sample in found] for prompt, found in samples.items()},
        )
    assert side.path is not None
    assert config.data.prompts is not None
    source = SampledModel(side.path, side.trust_remote_code, side.device)
    model, tokenizer = load_sampled(source)
    prompts = read_prompts(config.data.prompts, model, tokenizer, config.sampling, columns)
    drawn = sample(source, model, tokenizer, prompts.prompt_ids, config)
    # A prompt given twice is one prompt with twice the answers, as in a file of samples.
    found = SideAnswers({}, {})
    rows = prompts.columns or [{}] * len(prompts)
    for prompt, row, answers in zip(prompts.prompts, rows, drawn, strict=True):
        texts = [tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in answers]
        found.texts.setdefault(prompt, []).extend(texts)
        found.columns.setdefault(prompt, []).extend([row] * len(texts))
    return found


def progress(judged: Iterator[Judged], total: int) -> Iterator[Judged]:
    """Print now and then how many pairs are judged."""
    shown = 0
    for done, found in enumerate(judged, 1):
        if done == total or done - shown >= total / 5:
            shown = done
            print(f"judged {done} of {total}")
        yield found


def write_verdicts(
    path: Path, pairs: Sequence[AnswerPair], judged: Iterator[Judged], overwrite: bool
) -> list[Judged]:
    """Write a row for each pair as it comes: a verdict that was paid for is never lost."""
    kept: list[Judged] = []
    mode = "w" if overwrite else "x"  # x: nothing that appeared there meanwhile is replaced
    with path.open(mode, encoding="utf-8") as file, removed_if_empty(path):
        for pair, found in zip(pairs, judged, strict=True):
            kept.append(found)
            row = {
                "prompt": content_as_json(pair.prompt),
                "model": pair.model,
                "baseline": pair.baseline,
                "sample": pair.sample,
                "verdict": found.verdict,
                **found.details,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    return kept


@contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """Remove the file if a failure comes before the first verdict: the next try needs its name."""
    try:
        yield
    except BaseException:
        if path.stat().st_size == 0:
            path.unlink()
        else:
            print(f"what was judged until here is in {path}")
        raise


def summary(result: dict[str, Any]) -> str:
    """Return the result in a few lines."""
    lines = [
        f"win rate {result['win_rate']:.3f} ({result['win_rate_low']:.3f} to "
        f"{result['win_rate_high']:.3f}; {result['interval']}): {result['num_wins']} wins, "
        f"{result['num_ties']} ties (one half each), {result['num_losses']} losses on "
        f"{result['num_prompts']} prompts"
    ]
    if "share_unparsable" in result:
        first = result["share_first"]
        lines.append(
            f"judge: {result['share_unparsable']:.1%} of {result['num_answers']} answers without a "
            f"verdict ({result['num_undecided']} pairs left out), "
            f"{result['share_order_dependent']:.1%} of verdicts changed with the order"
            + ("" if first is None else f", {first:.1%} chose the answer that stood first")
        )
    return "\n".join(lines)


def main(config: WinRateConfig) -> int:
    """Run the command; return 0 when the JSON is written."""
    check(config)
    overwrite, inputs = config.overwrite, input_paths(config)
    out = check_file("out", config.out, overwrite=overwrite, inputs=inputs)
    verdicts = out.with_suffix(".verdicts.jsonl")
    check_file("out", verdicts, overwrite=overwrite, inputs=inputs)
    start = time.perf_counter()
    result: dict[str, Any] = {}
    if config.reward is not None:
        function = load_reward(
            config.reward, Compute(find_device(config.model.device, "model.device"))
        )
        columns = columns_of({f"reward: {config.reward}": function})
        for source in (config.data.prompts, config.model.samples, config.baseline.samples):
            if source is not None:
                require_columns(source, columns)
        ours, theirs = (
            answers_of(side, config, columns) for side in (config.model, config.baseline)
        )
        pairs = pair_answers(ours.texts, theirs.texts)
        given = (ours.columns_at(pairs), theirs.columns_at(pairs))
        judgements = iter(judge_by_reward(function, pairs, config.reward, given))
        judged = write_verdicts(verdicts, pairs, judgements, overwrite)
    else:
        template = read_template(config.judge.template)
        endpoint = ChatEndpoint(config.judge)
        print(f"every pair is asked about in both orders:\n\n{template}")
        ours, theirs = (answers_of(side, config) for side in (config.model, config.baseline))
        pairs = pair_answers(ours.texts, theirs.texts)
        asked = judge_by_endpoint(endpoint, template, pairs, config.judge.concurrency)
        judged = write_verdicts(verdicts, pairs, progress(asked, len(pairs)), overwrite)
        result = {**judge_statistics(judged), "num_retries": endpoint.num_retries}
        result["template"] = template
    print(f"each pair and its verdict written to {verdicts}")
    result = {**win_rate(pairs, judged), **result, "seconds": time.perf_counter() - start}
    result["config"] = asdict(config)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_file(out, text, overwrite=overwrite)
    print(summary(result))
    print(f"written to {out}")
    return 0
