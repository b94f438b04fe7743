"""`fastalign online-dpo`: DPO on fresh samples, the loss chosen by `--loss NAME`."""

from collections.abc import Sequence

from fastalign.cli.loss_parse import parse_with_loss
from fastalign.trainers import LOSSES, OnlineDPOConfig, train_online_dpo


def parse_online_dpo(arguments: Sequence[str]) -> OnlineDPOConfig:
    """The configuration of a run, see `parse_with_loss`."""
    return parse_with_loss(OnlineDPOConfig, LOSSES, arguments, "fastalign online-dpo")


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 130 after SIGINT; either way the run can be resumed."""
    return train_online_dpo(parse_online_dpo(argv)).exit_code
