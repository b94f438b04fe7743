"""Reward functions by name: `module:function`, a bag of words, or a trained reward model."""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.compute import ON_CPU, Compute, find_device
from fastalign.data import Content, Encoder, Message, content_as_json, load_tokenizer
from fastalign.models import (
    RewardScale,
    load_reward_model,
    model_without_weights,
    response_reward,
    response_values,
    reward_scale,
)
from fastalign.ranks.parallel import enter, load_on_first, share_by_fsdp

# (prompts, completions) -> one number each; a prompt is text or a list of {role, content}
RewardFunction = Callable[[list[Any], list[str]], Sequence[float]]


class BagOfWordsReward:
    """A transparent reward: a bias plus the weight of each word that the text contains.

    Args:
        path: JSON file with `bias` and `weights` (word -> number).

    Raises:
        ValueError: if the file does not have that form.
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
        """Return the reward of a text, in which each word counts once."""
        words = set(re.findall(r"[a-z][a-z']*", text.lower()))
        return self._bias + math.fsum(self._weights.get(word, 0.0) for word in sorted(words))

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        """Score prompt and completion together; in a conversation, the completion alone."""
        return [
            self.score(prompt + completion if isinstance(prompt, str) else completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


class ModelReward:
    """A trained reward model as a reward function: the score at the last token of each completion.

    A completion is tokenised as a response is in training, with an EOS: one that was cut off is
    scored as if it ended there. Scores are normalised by the `reward_mean` and `reward_std` of the
    model's configuration, which `fastalign reward` measures; models without them stay raw.

    Args:
        path: folder of a saved reward model, or a hub name.
        compute: its device, and its ranks and how they share models; all ranks call this with
            the same texts. None: a GPU if there is one, else the CPU. The rest of it is not used:
            scores do not depend on a run's precision or batches.
        raw: return scores as transformers serves them.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if there is no reward model; a causal model is refused, since its head would be
            random.
    """

    def __init__(
        self,
        path: str | Path,
        compute: Compute | None = None,
        *,
        raw: bool = False,
        trust_remote_code: bool = False,
    ):
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self._encoder = Encoder(self._tokenizer)
        asked = compute or Compute(find_device("auto"))
        device = asked.device
        self._compute = Compute(device, world=asked.world, parallel=asked.parallel)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if asked.parallel.strategy == "fsdp":
            self._model = load_on_first(
                asked.world,
                lambda: load_reward_model(path, ON_CPU, fresh_head=False, **options),
                lambda: model_without_weights(path, self._compute, reward=True, **options),
            )
            self._model.requires_grad_(False)
            share_by_fsdp(self._model, dtype=dtype, device=device)
        else:
            self._model = load_reward_model(path, self._compute, fresh_head=False, **options)
        self._scale = RewardScale() if raw else reward_scale(self._model)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """Return one score for each completion; a prompt is text or a list of {role, content}.

        Raises:
            ValueError: if an answer with its prompt is longer than the model's positions.
        """
        places: dict[Content, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(as_content(prompt), []).append(place)
        groups = [self._group(prompt, members, completions) for prompt, members in places.items()]
        rewards = response_values(self._batch_scores, groups, self._compute)
        found: dict[int, float] = {}
        for members, values in zip(places.values(), rewards, strict=True):
            scores = self._scale.normalise(values.double())
            found.update(zip(members, scores.tolist(), strict=True))
        return [found[place] for place in range(len(completions))]

    def _batch_scores(self, batch: PackedBatch) -> Tensor:
        return enter(self._model, lambda: response_reward(self._model, batch, self._compute))

    def _group(self, prompt: Content, members: list[int], completions: Sequence[str]) -> Group:
        source = f"answer {members[0] + 1}"
        group = self._encoder.answers(source, prompt, [completions[i] for i in members])
        limit = getattr(self._model.config, "max_position_embeddings", None) or 2**31
        for ids, place in zip(group.response_ids, members, strict=True):
            length = len(group.prompt_ids) + len(ids)
            if length > limit:
                raise ValueError(
                    f"answer {place + 1}: {length} tokens with its prompt, but the reward model "
                    f"has {limit} positions"
                )
        return group


def as_content(prompt: Any) -> Content:
    """Return text unchanged, and a list of {role, content} as messages."""
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(turn["role"], turn["content"]) for turn in prompt)


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
        except ValueError as error:  # the option is the reward's, not model.path
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
    """Call a reward function once for all completions, and check its result.

    Raises:
        ValueError: if the number of rewards is wrong, or one is not a finite number.
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
