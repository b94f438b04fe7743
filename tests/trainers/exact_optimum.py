"""A problem small enough to enumerate: every prompt's every answer, and the best policy, exactly.

The words are a, b, c; an answer is up to three of them, ended by EOS unless it has three. The best
policy of E[r] - beta KL(pi || rho) is rho(y|x) exp(r(x, y) / beta) / Z(x): arXiv 2305.18290, eq. 4.

Legend: P prompts, A answers of each; log-probs and rewards are (P, A) float64.
"""

from itertools import product
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.models.forward import sequence_logprobs
from tests.tiny import tiny_model

WORDS = {"a": 0, "b": 1, "c": 3}
EOS = 2  # what the tiny models' configuration says
MAX_NEW_TOKENS = 3
# Each with two different words: behind copies of one word, rotary attention averages equal values,
# and no weights can tell one copy from two.
PROMPTS = ["a b", "c a", "b b c"]
BETA = 0.3


def make_tokenizer() -> Any:
    """Four tokens, a word each, and EOS, which pads too."""
    vocabulary = {**WORDS, "</s>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )


def reward(prompts: list[Any], completions: list[str]) -> list[float]:
    """Likes what repeats the prompt's last word, then variety; dislikes length. In [-1, 1]."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = completion.split()
        first = bool(words) and words[0] == prompt.split()[-1]
        scores.append(0.8 * first + 0.3 * len(set(words)) - 0.25 * len(words) - 0.2)
    return scores


def all_answers() -> list[list[int]]:
    """Every answer that a sampler can draw: ended by EOS, or cut at the most tokens."""
    short = [
        [*ids, EOS] for n in range(MAX_NEW_TOKENS) for ids in product(WORDS.values(), repeat=n)
    ]
    return short + [list(ids) for ids in product(WORDS.values(), repeat=MAX_NEW_TOKENS)]


def answer_groups() -> list[Group]:
    """Each prompt with every answer."""
    answers = all_answers()
    return [Group([WORDS[word] for word in prompt.split()], answers) for prompt in PROMPTS]


def answer_rewards() -> Tensor:
    """(P, A): what `reward` gives to each answer's text."""
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in all_answers()]
    rows = [reward([prompt] * len(texts), texts) for prompt in PROMPTS]
    return torch.tensor(rows, dtype=torch.float64)


def make_policy() -> Any:
    """A tiny Llama over the four tokens."""
    return tiny_model("llama", vocab_size=len(WORDS) + 1)


def answer_logprobs(model: Any) -> Tensor:
    """(P, A): the log-prob of each answer under a model."""
    return torch.stack(sequence_logprobs(model, answer_groups(), Compute())).double()


def best_logprobs(reference_logprob: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(P, A): the policy that no other has a higher E[r] - beta KL than."""
    return (reference_logprob + rewards / beta).log_softmax(-1)


def objective(logprob: Tensor, reference_logprob: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(P,): E[r] - beta KL(pi || rho)."""
    return (logprob.exp() * (rewards - beta * (logprob - reference_logprob))).sum(-1)


def total_variation(logprob: Tensor, other: Tensor) -> Tensor:
    """(P,): half the summed differences of probabilities."""
    return (logprob.exp() - other.exp()).abs().sum(-1) / 2
