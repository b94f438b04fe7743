"""`fastalign dpo`: DPO and its relatives, the loss chosen by `--loss NAME`."""

from collections.abc import Sequence

from fastalign.cli.loss_parse import parse_with_loss
from fastalign.trainers import LOSSES, DPOConfig, train_dpo


def parse_dpo(arguments: Sequence[str]) -> DPOConfig:
    """The configuration of a run, see `parse_with_loss`."""
    return parse_with_loss(DPOConfig, LOSSES, arguments, "fastalign dpo")


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 130 after SIGINT; either way the run can be resumed."""
    return train_dpo(parse_dpo(argv)).exit_code
