"""Tokenizers trained in the test on a few sentences, with the habits of real families."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The battery life is excellent and the camera is very good.",
    "The screen is too dim, the buttons are small and the menu is slow.",
    "What is the best phone? The one that you like. [user] [assistant] yes no maybe",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's habit: the generation prompt opens a think block that finished answers do not show.
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
WITHOUT_END = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def _trained(adds_bos: bool, prefix_space: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return tokenizer.to_str()


def make_tokenizer(
    *,
    adds_bos: bool = True,
    pad_is_eos: bool = False,
    chat_template: str | None = None,
    prefix_space: bool = False,
) -> Any:
    """Return a BPE tokenizer of 320 tokens; `prefix_space` puts a space in front of every text.

    Each call returns an object of its own: a test may change it, and no later test sees that.
    """
    chatml = chat_template is not None and "im_end" in chat_template
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(adds_bos, prefix_space)),
        bos_token="<s>",
        eos_token="<|im_end|>" if chatml else "</s>",
        pad_token=("<|im_end|>" if chatml else "</s>") if pad_is_eos else "<pad>",
    )
    wrapped.chat_template = chat_template
    return wrapped


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text."""
    return [tokenizer.decode([token]) for token in ids]
