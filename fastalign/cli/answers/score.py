"""`fastalign score`: score a file of answers with a reward model."""

import statistics

from fastalign.cli.answers.sampling import as_lines
from fastalign.cli.settings import ScoreConfig
from fastalign.data.columns import RowColumns
from fastalign.data.read import read_samples
from fastalign.evaluation.rewards import ModelReward, apply_reward
from fastalign.written_files import check_file, input_paths, write_file


def main(config: ScoreConfig) -> int:
    """Run the command; return 0 when the file is written."""
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    samples = read_samples(config.data.samples, RowColumns(every=True))  # all are written
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
