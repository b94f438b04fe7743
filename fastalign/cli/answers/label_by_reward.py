"""`fastalign label-by-reward`: make preference pairs from sampled completions and a reward."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastalign.cli.answers.sampling import as_lines
from fastalign.cli.settings import LabelConfig
from fastalign.data.columns import as_lists
from fastalign.data.conversation import content_as_json
from fastalign.data.examples import Content
from fastalign.data.read import load_samples, require_columns
from fastalign.evaluation.rewards import apply_reward, columns_of, load_reward
from fastalign.written_files import check_file, input_paths, write_file


def best_and_worst(
    groups: Sequence[tuple[Content, list[str]]], rewards: Sequence[float], ties: str
) -> Iterator[dict[str, Any] | None]:
    """Yield a row per prompt, or None for a dropped tie or a prompt with one distinct answer."""
    place = 0
    for prompt, completions in groups:
        scored = list(zip(rewards[place : place + len(completions)], completions, strict=True))
        place += len(completions)
        best = max(scored, key=lambda pair: pair[0])
        worst = min(scored, key=lambda pair: pair[0])
        as_json = content_as_json(prompt)
        if best[0] > worst[0]:
            first, second, label = best[1], worst[1], "a"
        else:
            others = [text for text in completions if text != completions[0]]
            first, second, label = completions[0], others[0] if others else "", "tie"
        sides: list[Any] = [first, second]
        if not isinstance(prompt, str):
            sides = [[{"role": "assistant", "content": side}] for side in sides]
        if not first.strip() or not second.strip() or (label == "tie" and ties == "drop"):
            yield None
        elif ties == "keep":
            row = {"prompt": as_json, "response_a": sides[0], "response_b": sides[1]}
            yield row | {"label": label}
        else:
            row = {"prompt": as_json, "chosen": sides[0], "rejected": sides[1]}
            yield row | {"margin": best[0] - worst[0]}


def main(config: LabelConfig) -> int:
    """Run the command; return 0 when the file is written."""
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    function = load_reward(config.reward)
    columns = columns_of({f"reward: {config.reward}": function})
    require_columns(config.data.samples, columns)
    found = load_samples(config.data.samples, columns)
    flat = [sample for samples in found.values() for sample in samples]
    prompts, texts = [sample.prompt for sample in flat], [sample.completion for sample in flat]
    values = as_lists([sample.columns for sample in flat])
    rewards = apply_reward(function, prompts, texts, config.reward, values)
    groups = [(prompt, [s.completion for s in samples]) for prompt, samples in found.items()]
    rows = list(best_and_worst(groups, rewards, config.data.ties))
    pairs = [row for row in rows if row is not None]
    if not pairs:
        raise ValueError(
            f"data.samples: no prompt of {config.data.samples} has two answers that differ in "
            "reward; sample more of each (fastalign generate --sampling.num-samples)"
        )
    write_file(out, as_lines(pairs), overwrite=config.overwrite)
    dropped = len(rows) - len(pairs)
    print(
        f"{len(pairs)} pairs written to {config.out}; {dropped} prompts without one (ties, blanks)"
    )
    return 0
