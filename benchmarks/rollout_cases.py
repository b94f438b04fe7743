"""Cases of the samplers' benchmark: a model that never ends an answer, prompts of one length."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step_cases import EOS, FIRST_WORD, SHAPES, ModelShape, make_tokenizer

LAYER_FACTOR = 4.0
END_FACTOR = 1e5  # how much further EOS lies on the other side of what all tokens share


@dataclass(frozen=True)
class RolloutCase:
    """So many prompts of one length, each answered by exactly so many tokens."""

    name: str
    shape: ModelShape
    num_prompts: int
    prompt_length: int
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens that one call makes."""
        return self.num_prompts * self.new_tokens

    def prompts(self) -> list[list[int]]:
        """Random ids, always the same."""
        draw = random.Random(0)
        size = self.shape.vocab_size
        return [
            [draw.randrange(FIRST_WORD, size) for _ in range(self.prompt_length)]
            for _ in range(self.num_prompts)
        ]


CASES = {
    case.name: case
    for case in (
        RolloutCase("smallest", ModelShape("smallest", "llama", 256, 64, 96, 2, 2, 2), 4, 6, 5),
        RolloutCase("llama-3m", ModelShape("3m", "llama", 1000, 256, 688, 4, 4, 4), 64, 16, 64),
        RolloutCase(
            "llama-91m", ModelShape("91m", "llama", 8192, 768, 2048, 12, 12, 12), 64, 16, 64
        ),
        RolloutCase("qwen2.5-0.5b", SHAPES["qwen2.5-0.5b"], 256, 256, 512),
        RolloutCase("llama-3.2-1b", SHAPES["llama-3.2-1b"], 256, 256, 512),
    )
}
DEFAULT_CASES = {"cpu": ("llama-3m", "llama-91m"), "cuda": ("llama-3.2-1b",)}


def write_policy(shape: ModelShape, folder: Path) -> None:
    """Random weights, and the tokenizer that a server asks for.

    Every embedding has the same positive first entry, which no layer writes to, but EOS's, which
    has a large negative one. The head is tied: EOS is never drawn, others' logits move alike.
    Layers count for more than embeddings do: otherwise a tied head repeats its input, whatever the
    weights are, and no answer would show them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config()).float()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        shared = shape.hidden_size**0.5 * shape.initializer_range
        embedding[:, 0] = shared
        embedding[EOS, 0] = -END_FACTOR * shared
        for layer in model.model.layers:
            for matrix in (weight for weight in layer.parameters() if weight.ndim == 2):
                matrix.mul_(LAYER_FACTOR)
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    model.save_pretrained(folder)
    make_tokenizer(shape.vocab_size).save_pretrained(folder)


def disturb(parameters: Iterable[Tensor], seed: int) -> None:
    """Other weights, whose answers are others: by half at most, so that no sign is another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            factors = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.mul_(factors.to(parameter))
