"""The training algorithms, in one table that every command reads.

Nothing heavy is imported here: `fastalign --help` prints the table without loading transformers.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """A training command.

    Attributes:
        name: the command, as typed after `fastalign`.
        summary: one line for `fastalign --help`.
        config: name of its configuration in `fastalign.trainers`.
        train: name of the function in `fastalign.trainers` that runs it.
        losses: name of its table of losses in `fastalign.trainers`, chosen by `--loss NAME`; None
            where there is no choice.
        samples: whether it draws completions from the policy while it trains.
    """

    name: str
    summary: str
    config: str
    train: str
    losses: str | None = None
    samples: bool = False

    def loss_table(self) -> Mapping[str, type[Any]]:
        """Return the dataclass of each loss by its name; empty where there is no choice."""
        return {} if self.losses is None else _trainers(self.losses)

    def parse(self, arguments: Sequence[str]) -> Any:
        """Return the configuration that `--config FILE` and the flags describe.

        Raises:
            ValueError: an unknown key, flag or loss, or a value that does not fit.
            FileNotFoundError: there is no such file.
        """
        from fastalign.cli.config_parse import parse_config, parse_with_loss

        config, command = _trainers(self.config), f"fastalign {self.name}"
        if self.losses is None:
            return parse_config(config, arguments, command)
        return parse_with_loss(config, self.loss_table(), arguments, command)

    def run(self, arguments: Sequence[str]) -> int:
        """Train; return the exit code: 0 finished or SIGTERM, 130 after SIGINT, 3 collapsed."""
        return int(_trainers(self.train)(self.parse(arguments)).exit_code)


def _trainers(name: str) -> Any:
    return getattr(importlib.import_module("fastalign.trainers"), name)


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("sft", "fine-tune a model on demonstrations", "SFTConfig", "train_sft"),
        Algorithm(
            "dpo",
            "align a model with preference pairs (DPO and its relatives)",
            "DPOConfig",
            "train_dpo",
            losses="LOSSES",
        ),
        Algorithm(
            "online-dpo",
            "DPO on fresh samples, ordered by a reward",
            "OnlineDPOConfig",
            "train_online_dpo",
            losses="LOSSES",
            samples=True,
        ),
        Algorithm(
            "reward",
            "train a reward model on comparisons, ties among them",
            "RewardConfig",
            "train_reward",
            losses="REWARD_LOSSES",
        ),
        Algorithm(
            "ppo",
            "align a model with a reward (PPO, or without a critic)",
            "PPOConfig",
            "train_ppo",
            samples=True,
        ),
    )
}
