"""`fastalign score`: the rewards of a file of answers under a trained reward model."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastalign.cli.answers.sampling import SampledModel, new_file
from fastalign.cli.config_parse import parse_flags
from fastalign.data import read_samples
from fastalign.evaluation import ModelReward, apply_reward


@dataclass(frozen=True)
class ScoringModel(SampledModel):
    """The reward model."""


@dataclass(frozen=True)
class ScoreData:
    """Answers."""

    samples: str
    """File with `prompt` and `completion`, as `fastalign generate` writes it."""


@dataclass(frozen=True)
class ScoreConfig:
    """Writes every row again with its `reward`; an answer is scored with its end behind it."""

    model: ScoringModel
    data: ScoreData
    out: str
    """File (.jsonl) to write."""
    raw: bool = False
    """Scores as transformers serves them, not normalised by the model's reward_mean, reward_std."""


def main(argv: Sequence[str]) -> int:
    """Exit code 0: the file is written."""
    config = parse_flags(ScoreConfig, argv, "fastalign score")
    out = new_file(config.out)
    samples = read_samples(config.data.samples)
    model = ModelReward(
        config.model.path,
        config.model.compute(),
        raw=config.raw,
        trust_remote_code=config.model.trust_remote_code,
    )
    rewards = apply_reward(
        model, [sample.prompt for sample in samples], [sample.completion for sample in samples]
    )
    rows = [{**s.values, "reward": reward} for s, reward in zip(samples, rewards, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.write_text(text, encoding="utf-8")
    print(
        f"{len(rows)} answers scored, mean {statistics.fmean(rewards):.3f}, from "
        f"{min(rewards):.3f} to {max(rewards):.3f}; written to {config.out}"
    )
    return 0
