"""`fastalign new-model`: a tokenizer and a small Llama from scratch, for trying things out."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.cli.config_parse import parse_flags

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{{ message['content'] }}{{ eos_token + '\n' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


@dataclass(frozen=True)
class NewModelData:
    """Text for the tokenizer."""

    train: str
    """File, folder or hub name; all its text is read."""


@dataclass(frozen=True)
class NewModelRun:
    """Randomness."""

    seed: int = 0
    """Of the weights."""


@dataclass(frozen=True)
class NewModelConfig:
    """Trains a byte-level BPE tokenizer and writes a random Llama beside it."""

    data: NewModelData
    out: str
    """Folder to write, in transformers' layout."""
    vocab_size: int = 4096
    """Tokens, three special ones included; at least 259."""
    hidden_size: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    max_positions: int = 1024
    """Longest sequence."""
    run: NewModelRun = field(default_factory=NewModelRun)


def texts_of(source: str) -> Iterator[str]:
    """Every text in the rows of a source: plain columns and the contents of messages."""
    from fastalign.data import DataFault, read_texts

    for text in read_texts(source):
        if isinstance(text, DataFault):
            raise text
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with BOS, EOS and pad; it puts BOS in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(config: NewModelConfig, num_tokens: int) -> Any:
    """A Llama with random weights and tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.run.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_tokens,
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 5 // 2,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 0: the folder is written."""
    config = parse_flags(NewModelConfig, argv, "fastalign new-model")
    if config.vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab-size: expected at least 259, got {config.vocab_size}")
    for name in ("hidden_size", "layers", "heads"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"{flag}: expected at least 1, got {getattr(config, name)}")
    if config.hidden_size % (2 * config.heads):
        raise ValueError(
            f"hidden-size: expected a multiple of twice the {config.heads} heads, "
            f"got {config.hidden_size}"
        )
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder")
    texts = texts_of(config.data.train)
    first = next(texts, None)
    if first is None:
        raise ValueError(f"data.train: {config.data.train} holds no text")
    tokenizer = train_tokenizer(itertools.chain([first], texts), config.vocab_size)
    model = make_model(config, len(tokenizer))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"out": str(out), "tokens": len(tokenizer), "parameters": num_parameters}))
    return 0
