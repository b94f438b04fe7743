"""A trained reward model as a reward function of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.compute import ON_CPU, Compute, find_device
from fastalign.data import Content, Encoder, Message, load_tokenizer
from fastalign.models import (
    RewardScale,
    load_reward_model,
    model_without_weights,
    response_reward,
    reward_scale,
)
from fastalign.models.logprobs import response_values
from fastalign.ranks.parallel import enter, load_on_first, share_by_fsdp


class ModelReward:
    """The score of each completion behind its prompt, by position.

    A completion is tokenised as a response is in training, with its end behind it: one that was
    cut is scored as if it ended there. Scores are normalised by the model's own `reward_mean` and
    `reward_std`, which `fastalign reward` measures; a model of others' has none, and stays raw.

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
        """Scores in the completions' order; a prompt is text or a list of {role, content}.

        Raises:
            ValueError: an answer longer than the model's positions.
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
    """Text as it is; a list of {role, content} as messages."""
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(turn["role"], turn["content"]) for turn in prompt)
