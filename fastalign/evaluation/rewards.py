"""Reward functions by name: `module:function`, a bag of words, or a trained reward model."""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastalign.compute import Compute
from fastalign.data import Content, content_as_json
from fastalign.evaluation.reward_model import ModelReward

# (prompts, completions) -> one number each; a prompt is text or a list of {role, content}
RewardFunction = Callable[[list[Any], list[str]], Sequence[float]]


class BagOfWordsReward:
    """A transparent reward: a bias plus the weight of each word that the text contains.

    Args:
        path: JSON with `bias`, `weights` (word -> number).

    Raises:
        ValueError: the file is not of that form.
    """

    def __init__(self, path: str | Path):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            self._bias = float(content["bias"])
            self._weights = {str(word): float(w) for word, w in content["weights"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a JSON object with bias and weights: {error!r}"
            ) from None

    def score(self, text: str) -> float:
        """The reward of a whole text; a word counts once."""
        words = set(re.findall(r"[a-z][a-z']*", text.lower()))
        return self._bias + math.fsum(self._weights.get(word, 0.0) for word in sorted(words))

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        """Scores prompt and completion together; of a conversation, the completion alone."""
        return [
            self.score(prompt + completion if isinstance(prompt, str) else completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def load_reward(specification: str, compute: Compute | None = None) -> RewardFunction:
    """Load a reward: `module:function`, a bag of words (`.json`) or a reward model's folder.

    Modules are found as Python finds them, and in the current folder.

    Args:
        specification: the name, file or folder.
        compute: as for `ModelReward`, which alone needs it.

    Raises:
        ValueError: if there is no such module or function, or the folder holds no reward model.
        FileNotFoundError: if there is no such file.
    """
    if specification.endswith(".json"):
        if not Path(specification).is_file():
            raise FileNotFoundError(f"reward: no such file: {specification}")
        return BagOfWordsReward(specification)
    if Path(specification).is_dir():
        try:
            return ModelReward(specification, compute)
        except ValueError as error:  # whoever gave a reward must not look for it at the model
            raise ValueError(f"reward: {str(error).removeprefix('model.path: ')}") from error
    module_name, colon, name = specification.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(
            f"reward: expected module:function, a .json file or a folder, got {specification!r}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward: cannot import {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward: {module_name!r} has no function {name!r}")
    found: RewardFunction = function
    return found


def apply_reward(
    function: RewardFunction, prompts: Sequence[Content], completions: Sequence[str]
) -> list[float]:
    """Calls the function on everything at once, and checks what comes back.

    Raises:
        ValueError: another number of rewards, or one that is not a finite number.
    """
    plain = [content_as_json(prompt) for prompt in prompts]
    rewards = list(function(plain, list(completions)))
    if len(rewards) != len(completions):
        raise ValueError(
            f"reward: expected {len(completions)} numbers, one for each completion, "
            f"got {len(rewards)}"
        )
    for number, value in enumerate(rewards):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"reward: expected a finite number, got {value!r} (number {number})")
    return [float(value) for value in rewards]
