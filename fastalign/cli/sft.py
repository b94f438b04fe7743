"""`fastalign sft`: supervised fine-tuning."""

from collections.abc import Sequence

from fastalign.cli.config_parse import parse_config


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 130 after SIGINT; either way the run can be resumed."""
    from fastalign.trainers import SFTConfig, train_sft

    return train_sft(parse_config(SFTConfig, argv, "fastalign sft")).exit_code
