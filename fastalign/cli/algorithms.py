"""The training algorithms, in one table that every command reads.

Heavy imports are deferred: `fastalign --help` prints the table without loading transformers.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """A training command.

    Attributes:
        name: the command, as typed after `fastalign`.
        summary: one line for `fastalign --help`.
        config: name of its configuration in `fastalign.trainers`.
        train: name of the function in `fastalign.trainers` that runs it.
        choices: each setting that is one of several dataclasses, chosen by `--SETTING NAME`, to the
            name of its table in `fastalign.trainers`.
        samples: whether it draws completions from the policy while it trains.
    """

    name: str
    summary: str
    config: str
    train: str
    choices: Mapping[str, str] = field(default_factory=dict)
    samples: bool = False

    def table(self, setting: str) -> Mapping[str, type[Any]]:
        """Return the dataclasses of a choice by their names; empty if there is no such choice."""
        return _trainers(self.choices[setting]) if setting in self.choices else {}

    def parse(self, arguments: Sequence[str]) -> Any:
        """Return the configuration that `--config FILE` and the flags describe."""
        from fastalign.cli.config_parse import parse_config

        choices = {setting: self.table(setting) for setting in self.choices}
        return parse_config(_trainers(self.config), arguments, f"fastalign {self.name}", choices)

    def run(self, arguments: Sequence[str]) -> int:
        """Train; return the exit code: 0 finished or SIGTERM, 130 after SIGINT, 3 collapsed."""
        config = self.parse(arguments)  # before the import, which takes seconds
        if os.environ.get("RANK", "0") == "0":
            if [word.partition("=")[0] for word in arguments].count("--data.train") > 1:
                print(
                    "data.train is given more than once, and the last counts; several sources "
                    "stand behind one flag: a.jsonl b.jsonl"
                )
            print_settings(config)
        return int(_trainers(self.train)(config).exit_code)


def print_settings(config: Any) -> None:
    """Print the settings that are not at their defaults, a line each, and where all of them are."""
    from fastalign.runs.config import settings_off_default

    print(f"settings (defaults left out; {config.run.dir}/config.yaml has all):")
    for name, value in settings_off_default(config).items():
        print(f"  {name}: {' '.join(map(str, value)) if isinstance(value, tuple) else value}")


def _trainers(name: str) -> Any:
    return getattr(importlib.import_module("fastalign.trainers"), name)


# Choices of every algorithm that updates a policy by PPO's loss.
POLICY_GRADIENT = {
    "ppo.loss": "POLICY_LOSSES",
    "ppo.mean": "LOSS_MEANS",
    "ppo.importance": "IMPORTANCE",
}
ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("sft", "fine-tune a model on demonstrations", "SFTConfig", "train_sft"),
        Algorithm(
            "dpo",
            "align a model with preference pairs (DPO and related losses)",
            "DPOConfig",
            "train_dpo",
            choices={"loss": "LOSSES"},
        ),
        Algorithm(
            "kto",
            "align a model with answers found good or bad, one by one",
            "KTOConfig",
            "train_kto",
        ),
        Algorithm(
            "online-dpo",
            "align a model with DPO on fresh samples ordered by a reward",
            "OnlineDPOConfig",
            "train_online_dpo",
            choices={"loss": "LOSSES"},
            samples=True,
        ),
        Algorithm(
            "reward",
            "train a reward model on comparisons, including ties",
            "RewardConfig",
            "train_reward",
            choices={"loss": "REWARD_LOSSES"},
        ),
        Algorithm(
            "ppo",
            "align a model with a reward (PPO, RLOO or GRPO)",
            "PPOConfig",
            "train_ppo",
            choices={"ppo.advantage": "ADVANTAGES", **POLICY_GRADIENT, "kl": "KL_PENALTIES"},
            samples=True,
        ),
        Algorithm(
            "grpo",
            "align a model with a reward by GRPO (no value model)",
            "GRPOConfig",
            "train_ppo",
            choices={
                "ppo.advantage": "GRPO_ADVANTAGES",
                **POLICY_GRADIENT,
                "kl": "GRPO_KL_PENALTIES",
            },
            samples=True,
        ),
        Algorithm(
            "rloo",
            "align a model with a reward by RLOO (no value model)",
            "RLOOConfig",
            "train_ppo",
            choices={"ppo.advantage": "RLOO_ADVANTAGES", **POLICY_GRADIENT, "kl": "KL_PENALTIES"},
            samples=True,
        ),
    )
}
