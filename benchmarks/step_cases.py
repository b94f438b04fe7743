"""The inputs of a step: rows of token ids and a model's shape, written as files.

Trainers read rows as text: each word stands for a token id, and a tokenizer of these words is
written with the model. So every trainer runs as its users run it, on the same token ids.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.batch.packed import Group

PAD, EOS, UNKNOWN, FIRST_WORD = 0, 2, 3, 4
MAX_LENGTH = 4096  # no row is longer
MAX_CHAT_LENGTH = 1024  # both trainers' own default
SIZES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "tie_word_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


@dataclass(frozen=True)
class StepCase:
    """Bounds of uniformly drawn lengths, EOS included; None if the rows come from a file."""

    name: str
    prompt_lengths: tuple[int, int] | None
    response_lengths: tuple[int, int] | None


@dataclass(frozen=True)
class PPOCase:
    """Sizes of a PPO iteration; all its samples are one mini-batch."""

    name: str
    advantage: str
    num_prompts: int
    prompt_lengths: tuple[int, int]
    num_samples: int
    new_tokens: int
    epochs: int

    @property
    def has_value(self) -> bool:
        """True with a value model, which begins as the reward model."""
        return self.advantage == "gae"


@dataclass(frozen=True)
class ModelShape:
    """A model configuration by transformers' names; weights are random."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    def products(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of every linear layer in the blocks."""
        width, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        attention = [(width, width), (width, kv), (width, kv), (width, width)]
        mlp = [(width, self.intermediate_size)] * 2 + [(self.intermediate_size, width)]
        return (attention + mlp) * self.num_layers

    def config(self) -> Any:
        """Return the configuration, with tied embeddings as in all of these models."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type](
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=self.initializer_range,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )


CASES = {
    case.name: case
    for case in (
        StepCase("long-prompts", (128, 384), (32, 128)),
        StepCase("short-prompts", (16, 48), (128, 384)),
        StepCase("long-responses", (64, 64), (2048, 2048)),
        StepCase("chat", None, None),
        StepCase("small", (4, 12), (2, 6)),
    )
}
PPO_CASES = {
    case.name: case
    for case in (
        PPOCase("gae", "gae", 16, (32, 64), 1, 64, 4),
        PPOCase("rloo", "rloo", 4, (32, 64), 4, 64, 2),
        PPOCase("grpo", "grpo", 4, (192, 256), 4, 64, 1),
        PPOCase("gae-small", "gae", 3, (4, 12), 1, 5, 2),
        PPOCase("rloo-small", "rloo", 2, (4, 12), 3, 5, 2),
        PPOCase("grpo-small", "grpo", 2, (4, 12), 3, 5, 1),
    )
}
DEFAULT_PPO_CASES = ("gae", "rloo", "grpo")
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-28m", "llama", 32000, 384, 1024, 10, 6, 2),
        ModelShape("tiny", "llama", 256, 32, 48, 2, 4, 2, initializer_range=0.4),
        ModelShape("smollm2-135m", "llama", 49152, 576, 1536, 30, 9, 3),
        ModelShape("qwen2.5-0.5b", "qwen2", 151936, 896, 4864, 24, 14, 2),
        ModelShape("llama-3.2-1b", "llama", 128256, 2048, 8192, 16, 32, 8),
    )
}
DEFAULT_CASES = ("long-prompts", "short-prompts")
DEFAULT_SHAPES = {
    "cpu": ("llama-28m",),
    "cuda": ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b"),
}
DEFAULT_PAIRS = {"cpu": 8, "cuda": 16}


def make_groups(
    case: StepCase, vocab_size: int, num_groups: int, num_responses: int
) -> list[Group]:
    """Return fixed prompts of random ids, each with `num_responses` that end in EOS.

    A larger `num_responses` keeps the prompts and the first responses.
    """
    assert case.prompt_lengths is not None
    assert case.response_lengths is not None
    groups = []
    for number in range(num_groups):
        draw = random.Random(number)

        def ids(bounds: tuple[int, int], draw: random.Random = draw) -> list[int]:
            return [draw.randrange(FIRST_WORD, vocab_size) for _ in range(draw.randint(*bounds))]

        prompt = ids(case.prompt_lengths)
        responses = [[*ids(case.response_lengths)[:-1], EOS] for _ in range(num_responses)]
        groups.append(Group(prompt, responses))
    return groups


def read_groups(path: Path, vocab_size: int, num_groups: int) -> list[Group]:
    """Return some preference rows of a file, tokenised by a BPE that is trained on the file.

    Raises:
        ValueError: if fewer than `num_groups` rows fit.
    """
    from fastalign.cli.models import train_tokenizer
    from fastalign.data.load import load_examples
    from fastalign.data.read import read_texts

    tokenizer = train_tokenizer(read_texts(str(path)), vocab_size - FIRST_WORD + 1)
    limit = MAX_CHAT_LENGTH
    data = load_examples(path, "preference", tokenizer, max_length=limit, on_too_long="skip")
    if len(data.groups) < num_groups:
        raise ValueError(
            f"--data: expected at least {num_groups} pairs of up to {limit} tokens in {path}, "
            f"got {len(data.groups)}"
        )
    eos = tokenizer.eos_token_id

    def renamed(ids: Sequence[int]) -> list[int]:
        return [EOS if token == eos else token + FIRST_WORD - 1 for token in ids]

    chosen = random.Random(0).sample(range(len(data.groups)), num_groups)
    return [
        Group(
            renamed(data.groups[i].prompt_ids),
            [[*renamed(ids)[:-1], EOS] for ids in data.groups[i].response_ids],
        )
        for i in chosen
    ]


def word(token: int) -> str:
    """Return the word of a token id."""
    return {PAD: "<pad>", EOS: "</s>", UNKNOWN: "<unk>"}.get(token, f"w{token}")


def write_rows(groups: Sequence[Group], path: Path, kind: str) -> list[dict[str, str]]:
    """Write the groups as JSON Lines in TRL's columns, without EOS, which the trainers add."""
    names = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompts": ()}[kind]
    rows = []
    for group in groups:
        row = {"prompt": " ".join(map(word, group.prompt_ids))}
        for name, ids in zip(names, group.response_ids, strict=False):
            assert ids[-1] == EOS
            row[name] = " " + " ".join(map(word, ids[:-1]))
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def make_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of the words that stand for token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(UNKNOWN)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=word(PAD),
        eos_token=word(EOS),
        unk_token=word(UNKNOWN),
    )


def check_shape(found: Any, shape: ModelShape, weights: Path) -> None:
    """Raise ValueError if a pretrained model's configuration has other sizes than the shape."""
    for name, wanted in shape.config().to_dict().items():
        if name in SIZES and getattr(found, name) != wanted:
            raise ValueError(
                f"--weights {weights}: expected {name} {wanted} of {shape.name}, "
                f"got {getattr(found, name)}"
            )


def write_model(
    shape: ModelShape, folder: Path, seed: int, *, reward: bool = False, weights: Path | None = None
) -> None:
    """Write a model and the tokenizer of words; weights are random, or those of a pretrained model.

    Raises:
        ValueError: if the pretrained model is of another shape.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = shape.config()
    if weights is not None:
        check_shape(pretrained := AutoConfig.from_pretrained(weights), shape, weights)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(pretrained, name, getattr(config, name))
        config = pretrained
    if reward:
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if weights is None:
        model = kind.from_config(config)
    else:
        model = kind.from_pretrained(weights, config=config)
    model.float().save_pretrained(folder)
    make_tokenizer(shape.vocab_size).save_pretrained(folder)
