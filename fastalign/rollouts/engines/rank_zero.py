"""Several ranks, one engine: rank 0 drives it, and all have what it answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from fastalign.ranks.world import World
from fastalign.rollouts.engines.overlapped import OverlappedSampler
from fastalign.rollouts.engines.policy_access import PolicyAccess, ShardedAccess
from fastalign.rollouts.engines.synced import SyncedSampler
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams

T = TypeVar("T")
ERRORS: tuple[type[Exception], ...] = (SamplerFailed, ValueError, OSError)


class RankZeroSampler:
    """A sampler of all ranks, which make each call alike, with the same prompts.

    What fails on rank 0 fails on every rank, at the same call.

    Args:
        sampler: on rank 0, what samples; on the others None.
        policy: that it samples from, which the ranks may share.
        world: the ranks.
    """

    def __init__(
        self,
        sampler: SyncedSampler | OverlappedSampler | None,
        policy: PolicyAccess,
        world: World,
    ):
        if (sampler is None) == world.is_first:
            raise ValueError(f"sampler: expected one on rank 0 alone, rank {world.rank} got other")
        self._sampler, self._policy, self._world = sampler, policy, world
        self.overlaps: bool = world.of_first(isinstance(sampler, OverlappedSampler))
        self._version = 0

    @property
    def version(self) -> int:
        """Of the policy as it is."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        """Says that the policy has changed."""
        self._version = version
        if self._sampler is not None:
            self._sampler.version = version

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Completions of all prompts, on every rank.

        Raises:
            ValueError, SamplerFailed: what the sampler raised on rank 0.
        """
        return self._all_do(lambda sampler: sampler.generate(prompt_ids, params, seed=seed))

    def begin(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> None:
        """See `OverlappedSampler`."""
        self._all_do(lambda sampler: sampler.begin(prompt_ids, params, seed=seed))

    def state(self) -> dict[str, Any]:
        """See `OverlappedSampler`."""
        return self._all_do(lambda sampler: sampler.state())

    def restore(self, state: dict[str, Any]) -> None:
        """See `OverlappedSampler`."""
        self._all_do(lambda sampler: sampler.restore(state))

    def metrics(self) -> dict[str, float | int]:
        """See `SyncedSampler`."""
        return self._all_do(lambda sampler: sampler.metrics())

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `SyncedSampler`."""
        self.version = version

    def close(self) -> None:
        """Ends rank 0's sampler."""
        if self._sampler is not None:
            self._sampler.close()

    def _all_do(self, work: Callable[[Any], T]) -> T:
        """The work's result on rank 0; the others serve a sharded policy meanwhile."""
        if not isinstance(self._policy, ShardedAccess):
            return self._world.first_does(lambda: work(self._sampler), ERRORS)
        if self._sampler is not None:
            return self._first_of_shards(work)
        number, value = self._policy.serve()
        if number is not None:
            raise ERRORS[number](value)
        return value  # type: ignore[no-any-return]

    def _first_of_shards(self, work: Callable[[Any], T]) -> T:
        try:
            found = work(self._sampler)
        except ERRORS as error:
            number = next(n for n, kind in enumerate(ERRORS) if isinstance(error, kind))
            self._world.of_first(("done", (number, str(error))))
            raise
        self._world.of_first(("done", (None, found)))
        return found
