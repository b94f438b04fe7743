"""A problem small enough to enumerate: every prompt's every answer, and the best policy, exactly.

The words are a, b, c; an answer is up to three of them, ended by EOS unless it has three. The best
policy of E[r] - beta KL(pi || rho) is rho(y|x) exp(r(x, y) / beta) / Z(x): arXiv 2305.18290, eq. 4.

Legend: P prompts, A answers of each; log-probs and rewards are (P, A) float64.
"""

import math
from collections.abc import Callable
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


def root_of(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a function that falls from above 0 to below it, by bisection."""
    assert function(low) > 0 > function(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def local_logprobs(reference_logprob: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """(A,): the policy whose every token is the best one by the answers that follow it.

    That is pi(a|h) = rho(a|h) exp(Q(h, a) / temperature) / Z(h), where Q is the mean reward of the
    policy's own answers that begin so: where a KL enters at the token alone, not what comes after.
    """
    answers = [tuple(ids) for ids in all_answers()]
    mass = reference_logprob.exp()
    logprob = torch.zeros_like(rewards)

    def value(prefix: tuple[int, ...]) -> Tensor:
        """Fill the log-probs of what follows a prefix; return its mean reward."""
        if prefix in answers:
            return rewards[answers.index(prefix)]
        n = len(prefix)
        tokens = sorted({ids[n] for ids in answers if ids[:n] == prefix})
        begins = [
            torch.tensor([ids[: n + 1] == (*prefix, token) for ids in answers]) for token in tokens
        ]
        each = torch.stack([value((*prefix, token)) for token in tokens])
        rho = torch.stack([mass[these].sum() for these in begins]).log().log_softmax(-1)
        own = (rho + each / temperature).log_softmax(-1)
        for these, found in zip(begins, own, strict=True):
            logprob[these] += found
        return own.exp() @ each

    value(())
    return logprob


def grpo_logprobs(reference_logprob: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(P, A): the policy that GRPO with each token's KL in its loss does not move.

    Its advantages are rewards over their deviation, that of the policy's own answers: so the
    temperature is beta times the deviation under the policy of that temperature. This one is
    stable; for beta below about 0.8 there is none here but the policies whose answers are equally
    good, with a deviation of 0.
    """

    def of_prompt(reference: Tensor, reward: Tensor) -> Tensor:
        def excess(deviation: float) -> float:
            p = local_logprobs(reference, reward, beta * deviation).exp()
            return float((p @ reward.square() - (p @ reward).square()).sqrt()) - deviation

        return local_logprobs(reference, reward, beta * root_of(excess, 0.3, 2.0))

    return torch.stack([of_prompt(*rows) for rows in zip(reference_logprob, rewards, strict=True)])


def kto_logprobs(reference_logprob: Tensor, good: Tensor, beta: float) -> Tensor:
    """(P, A): the policy of the least expected KTO loss, where (P, A) answers are called good.

    With u = log(pi / rho) an answer's share of the loss is, but for a constant, -rho (2 good - 1)
    sigmoid(beta u), the KL being 0 (the mean log-ratio of the reference's own answers is below 0).
    Answers that are more often bad get no probability; of the others, (2 good - 1) sigmoid'(beta
    u) exp(-u), the derivative by pi, is the same for all.
    """
    margin = 2 * good - 1

    def log_ratio(weight: float, level: float) -> float:
        def slope(u: float) -> float:
            likely = 1 / (1 + math.exp(-beta * u))
            return math.log(weight * likely * (1 - likely)) - u - level

        return root_of(slope, -60.0, 60.0)

    def of_prompt(reference: Tensor, weights: Tensor) -> Tensor:
        def logprob(level: float) -> Tensor:
            ratios = [log_ratio(w, level) if w > 0 else -torch.inf for w in weights.tolist()]
            return reference + torch.tensor(ratios, dtype=torch.float64)

        level = root_of(lambda level: float(logprob(level).logsumexp(-1)), -20.0, 20.0)
        return logprob(level)

    return torch.stack([of_prompt(*rows) for rows in zip(reference_logprob, margin, strict=True)])
