"""The interface of all samplers: token ids in, token ids and their log-probs out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

TINY, HUGE = 1e-37, 1e38  # temperatures that float32 holds
MOST_SAMPLES = 2**16  # of a prompt; more than any estimate needs is a mistyped number


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling."""

    max_new_tokens: int = 128
    """Most tokens of a completion, including its EOS."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens with this total probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    num_samples: int = 1
    """Number of completions of each prompt."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples"):
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise ValueError(f"sampling.{name}: expected at least 1, got {got}")
        if self.num_samples > MOST_SAMPLES:
            raise ValueError(
                f"sampling.num_samples: expected at most {MOST_SAMPLES}, got {self.num_samples}"
            )
        if self.temperature != 0 and not TINY <= self.temperature <= HUGE:
            raise ValueError(
                f"sampling.temperature: expected 0, or a number from {TINY} to {HUGE}, got "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k: expected at least 0, got {self.top_k}")


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        token_ids: its tokens, including the EOS if it ended with one.
        logprobs: log-prob of each token under the distribution it was drawn from, nats.
        finish_reason: `stop` at an EOS, `length` at `max_new_tokens`.
        version: version of the weights that it was drawn from, as given to the sampler.
        weights: hash of those weights, as an engine loaded them; empty without an engine.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    version: int = 0
    weights: str = ""


class SamplerFailed(ConnectionError):
    """Raised if the sampler's engine is dead, silent or unreliable; it may be built anew."""


class Sampler(Protocol):
    """Interface of an object that draws completions from a policy."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw `params.num_samples` completions of each prompt, in the prompts' order."""

    def close(self) -> None:
        """Free what the sampler holds."""


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """Return the seed of one completion, in [0, 2**63): a pure function of the arguments."""
    # Python's hash of integers is fixed, and mixes the three well enough to seed a generator from.
    return hash((seed, prompt, sample)) & (2**63 - 1)


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], params: SamplingParams, limit: int | None, num_tokens: int
) -> None:
    """Check that all prompts can be answered in full.

    `limit` is the number of the model's positions (None: no limit), `num_tokens` the size of its
    vocabulary.

    Raises:
        ValueError: if a prompt is empty, leaves no room for the answer, or holds a token that the
            model does not have.
    """
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {number}: expected at least one token, got none")
        if limit is not None and len(ids) + params.max_new_tokens > limit:
            raise ValueError(
                f"prompt {number}: {len(ids)} tokens and {params.max_new_tokens} new ones "
                f"are more than the model's {limit} positions"
            )
        if not 0 <= min(ids) <= max(ids) < num_tokens:
            foreign = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"prompt {number}: expected tokens from 0 to {num_tokens - 1}, got {foreign}"
            )
