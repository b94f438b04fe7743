"""What every sampler offers: token ids in, token ids and their log-probs out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn."""

    max_new_tokens: int = 128
    """Most tokens of a completion, its EOS included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    num_samples: int = 1
    """Completions of each prompt."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples"):
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise ValueError(f"sampling.{name}: expected at least 1, got {got}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"sampling.temperature: expected a finite number of at least 0, got "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k: expected at least 0, got {self.top_k}")


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: with the EOS, where there is one.
        logprobs: of each token under the distribution it was drawn from, nats.
        finish_reason: `stop` at an EOS, `length` at `max_new_tokens`.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Sampler(Protocol):
    """Draws completions from a policy."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """`params.num_samples` completions of each prompt, in the prompts' order."""

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes over the policy's weights; completions that follow are `version`'s."""

    def close(self) -> None:
        """Gives back what the sampler holds."""
