"""`fastalign ppo`: PPO from one reward or a sum of several, and its critic-free relatives."""

from collections.abc import Sequence

from fastalign.cli.config_parse import parse_config
from fastalign.trainers import PPOConfig, train_ppo


def main(argv: Sequence[str]) -> int:
    """Exit code 0; 130 after SIGINT, 3 where --watch.stop ended a collapsed run: both saved."""
    return train_ppo(parse_config(PPOConfig, argv, "fastalign ppo")).exit_code
