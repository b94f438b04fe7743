"""`fastalign reward`: a reward model from comparisons, the loss chosen by `--loss NAME`."""

from collections.abc import Sequence

from fastalign.cli.loss_parse import parse_with_loss
from fastalign.trainers import REWARD_LOSSES, RewardConfig, train_reward


def parse_reward(arguments: Sequence[str]) -> RewardConfig:
    """The configuration of a run, see `parse_with_loss`."""
    return parse_with_loss(RewardConfig, REWARD_LOSSES, arguments, "fastalign reward")


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 130 after SIGINT; either way the run can be resumed."""
    return train_reward(parse_reward(argv)).exit_code
