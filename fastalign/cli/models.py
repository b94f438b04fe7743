"""`fastalign new-model` and `fastalign merge`: make a small model, or merge an adapter."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastalign.written_files import check_folder, check_not_among_data, input_paths, written_folder

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{{ message['content'] }}{{ eos_token + '\n' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


@dataclass(frozen=True)
class NewModelData:
    """The text that trains the tokenizer."""

    train: str
    """File, folder or hub name whose text is all read."""


@dataclass(frozen=True)
class NewModelRun:
    """Randomness of the weights."""

    seed: int = 0
    """Random seed of the weights."""


@dataclass(frozen=True)
class NewModelConfig:
    """Train a byte-level BPE tokenizer and write it with a small Llama of random weights."""

    data: NewModelData
    out: str
    """Folder to write in transformers' layout."""
    vocab_size: int = 4096
    """Size of the vocabulary, three special tokens included; at least 259."""
    hidden_size: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    max_positions: int = 1024
    """Maximum sequence length."""
    run: NewModelRun = field(default_factory=NewModelRun)
    overwrite: bool = False
    """Replace the folder if it exists."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with BOS, EOS and pad; it prepends BOS, as Llama's does."""
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
    """Return a Llama with random weights and tied embeddings."""
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


def new_model(config: NewModelConfig) -> int:
    """Run `fastalign new-model`; return 0 when the folder is written."""
    from fastalign.data.read import read_texts

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
    check_folder("out", out, overwrite=config.overwrite, inputs=input_paths(config))
    check_not_among_data("out", out, input_paths(config))
    texts = read_texts(config.data.train)
    first = next(texts, None)
    if first is None:
        raise ValueError(f"data.train: {config.data.train} holds no text")
    tokenizer = train_tokenizer(itertools.chain([first], texts), config.vocab_size)
    model = make_model(config, len(tokenizer))
    with written_folder(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"out": str(out), "tokens": len(tokenizer), "parameters": num_parameters}))
    return 0


@dataclass(frozen=True)
class MergeModel:
    """The adapter."""

    path: str
    """Folder in peft's layout, which names its base."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the base."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of the weights that are written; auto is that of the base."""


@dataclass(frozen=True)
class MergeConfig:
    """Add an adapter to its base, in float32, and write the model to OUT."""

    model: MergeModel
    out: str
    """Folder to write in transformers' layout."""
    overwrite: bool = False
    """Replace the folder if it exists."""


def merge(config: MergeConfig) -> int:
    """Run `fastalign merge`; return 0 when the folder is written."""
    from fastalign.compute import Compute
    from fastalign.data.tokenizer import eos_token_ids, load_tokenizer, use_distinct_pad
    from fastalign.models.load import (
        load_policy,
        load_reward_model,
        save_model,
        save_reward_model,
        set_save_dtype,
    )
    from fastalign.models.lora_files import adapter_base, is_reward_adapter
    from fastalign.models.reward import set_pad_token
    from fastalign.runs.final_model import write_end_tokens

    out = Path(config.out)
    check_folder("out", out, overwrite=config.overwrite, inputs=input_paths(config))
    if adapter_base(config.model.path) is None:
        raise ValueError(f"model.path: {config.model.path} is no adapter's folder (peft's layout)")
    trust, scores = config.model.trust_remote_code, is_reward_adapter(config.model.path)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=trust)
    load, save = (load_reward_model, save_reward_model) if scores else (load_policy, save_model)
    model = load(config.model.path, Compute(packing="padded"), trust_remote_code=trust)
    set_save_dtype(model, config.model.save_dtype)
    if scores and model.config.pad_token_id != tokenizer.pad_token_id:  # another program's adapter
        ends = eos_token_ids(tokenizer, config.model.path)
        set_pad_token(model, use_distinct_pad(tokenizer, ends))
    with written_folder(out) as aside:
        save(model, tokenizer, aside)
        write_end_tokens(aside, tokenizer)
    print(f"merged model written to {out}")
    return 0
