"""The settings of algorithms that sample: prompts (`--data.*`) and scores (`--reward.*`)."""

import math
from dataclasses import dataclass
from typing import Literal

from fastalign.runs.config import within


@dataclass(frozen=True)
class FrozenReferenceConfig:
    """The frozen model that the policy is held near; under an adapter it is the base."""

    path: str | None = None
    """Folder or hub name; default: the model that training starts from."""


@dataclass(frozen=True)
class WatchConfig:
    """Limits past which a policy counts as collapsed: it is said and logged (`collapsed`)."""

    stop: bool = False
    """End the run after `patience` steps past a limit: saved, exit code 3."""
    patience: int = 3
    """Steps in a row."""
    min_entropy: float = 0.05
    """Least mean entropy, in nats a token."""
    min_length: float = 1.5
    """Least mean length of completions, in tokens, their EOS included."""
    max_unfinished: float = 0.95
    """Largest share of completions without an end."""
    max_repeated: float = 0.5
    """Largest share of completions most of whose runs of four tokens are repeats."""
    max_kl: float = 100.0
    """Largest mean KL of a response to the reference, in nats."""

    def __post_init__(self) -> None:
        within("watch.patience", self.patience, 1)
        for name in ("min_entropy", "min_length", "max_kl"):
            within(f"watch.{name}", getattr(self, name), 0)
        for name in ("max_unfinished", "max_repeated"):
            within(f"watch.{name}", getattr(self, name), 0, 1)


@dataclass(frozen=True)
class PromptDataConfig:
    """Prompts to be answered, and what happens to rows that do not fit."""

    train: str = ""
    """File, folder or hub name with a `prompt` column."""
    eval: str | None = None
    """Held-out prompts."""
    max_length: int = 512
    """Most tokens of a prompt; its answers' tokens come on top of it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop, or skip and count it."""
    on_too_long: Literal["error", "skip"] = "error"
    """A prompt over max_length, or with no room for an answer: stop, or skip and count it."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError(f"data.train: expected a file, folder or hub name, got {self.train!r}")
        if self.max_length < 1:
            raise ValueError(f"data.max_length: expected at least 1, got {self.max_length}")


@dataclass(frozen=True)
class RewardSourceConfig:
    """What completions are scored by."""

    sources: tuple[str, ...] = ()
    """Each `module:function` (prompts, completions) -> numbers, a reward model's folder, or a bag
    of words (.json)."""
    weights: tuple[float, ...] = ()
    """Of each source in the sum; default: 1 each."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a completion that did not end."""
    normalise: bool = False
    """Bring scores to mean 0 and standard deviation 1 on samples of the starting policy: once."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "reward.sources: expected at least one of module:function, a reward model's folder "
                "or a .json file, got none"
            )
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"reward.weights: expected {len(self.sources)}, one for each of reward.sources, "
                f"got {len(self.weights)}"
            )
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights: expected finite numbers, got {weight}")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise ValueError(
                "reward.missing_eos_penalty: expected a finite number of at least 0 (it is "
                f"subtracted), got {self.missing_eos_penalty}"
            )
