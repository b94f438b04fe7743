"""Several ranks, one engine: rank 0 drives it, and answers everybody's prompts."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastalign.rollouts.sampler import Completion, Sampler, SamplerFailed, SamplingParams
from fastalign.rollouts.weights import whole


class RankZeroSampler:
    """A sampler of all ranks of the default process group; all of them make each call.

    The prompts count as one list, rank after rank, so that the same seed draws the same tokens
    however many ranks share them. What fails on rank 0 fails on every rank, at the same call.

    Args:
        sampler: on rank 0, what samples; on the others None.
    """

    def __init__(self, sampler: Sampler | None):
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        if (sampler is None) != (self._rank > 0):
            raise ValueError(f"sampler: expected one on rank 0 alone, rank {self._rank} got other")
        self._sampler = sampler

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Completions of this rank's prompts.

        Raises:
            ValueError, SamplerFailed: what the sampler raised on rank 0.
        """
        asked: list[Any] = [None] * self._size if self._rank == 0 else []
        dist.gather_object([list(ids) for ids in prompt_ids], asked or None)
        outcome: list[Any] = [None]
        if self._sampler is not None:
            everyone = [ids for of_rank in asked for ids in of_rank]
            outcome = [_attempt(lambda s: s.generate(everyone, params, seed=seed), self._sampler)]
        answers = _settled(outcome)
        lengths: list[Any] = [[len(of_rank) for of_rank in asked]]
        dist.broadcast_object_list(lengths)
        start = sum(lengths[0][: self._rank])
        found: list[list[Completion]] = answers[start : start + len(prompt_ids)]
        return found

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gives rank 0's sampler the weights; sharded ones are gathered by all ranks, in order.

        Raises:
            ValueError, SamplerFailed: what the sampler raised on rank 0.
        """
        gathered = ((name, whole(tensor)) for name, tensor in named_tensors)
        outcome: list[Any] = [None]
        if self._sampler is not None:
            tensors = list(gathered)
            outcome = [_attempt(lambda s: s.sync_weights(tensors, version), self._sampler)]
        else:
            for _ in gathered:  # each a collective
                pass
        _settled(outcome)

    def close(self) -> None:
        """Ends rank 0's sampler."""
        if self._sampler is not None:
            self._sampler.close()


def _attempt(call: Any, sampler: Sampler) -> tuple[str, Any]:
    try:
        return "done", call(sampler)
    except (ValueError, SamplerFailed) as error:
        return type(error).__name__, str(error)


def _settled(outcome: list[Any]) -> Any:
    """Rank 0's outcome, on every rank."""
    dist.broadcast_object_list(outcome)
    kind, value = outcome[0]
    if kind == "done":
        return value
    raise SamplerFailed(value) if kind == SamplerFailed.__name__ else ValueError(value)
