"""`fastalign score`: score a file of answers with a reward model."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastalign.cli.answers.sampling import SampledModel, as_lines
from fastalign.cli.config_parse import parse_flags
from fastalign.data.read import read_samples
from fastalign.evaluation.rewards import ModelReward, apply_reward
from fastalign.written_files import check_file, input_paths, write_file


@dataclass(frozen=True)
class ScoringModel(SampledModel):
    """The reward model."""


@dataclass(frozen=True)
class ScoreData:
    """The answers."""

    samples: str
    """File with `prompt` and `completion`, as written by `fastalign generate`."""


@dataclass(frozen=True)
class ScoreConfig:
    """Write every row with its `reward`, scored at the EOS that is appended to the answer."""

    model: ScoringModel
    data: ScoreData
    out: str
    """File (.jsonl) to write."""
    raw: bool = False
    """Write the scores of transformers, without normalising by reward_mean and reward_std."""
    overwrite: bool = False
    """Replace the file if it exists."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 when the file is written."""
    config = parse_flags(ScoreConfig, argv, "fastalign score")
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
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
    write_file(out, as_lines(rows), overwrite=config.overwrite)
    print(
        f"{len(rows)} answers scored, mean {statistics.fmean(rewards):.3f}, from "
        f"{min(rewards):.3f} to {max(rewards):.3f}; written to {config.out}"
    )
    return 0
