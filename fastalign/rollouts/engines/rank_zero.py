"""One engine for several ranks: rank 0 drives it, and all get its answers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastalign.ranks.world import World
from fastalign.rollouts.engines.overlapped import OverlappedSampler
from fastalign.rollouts.engines.policy_access import PolicyAccess, ShardedAccess
from fastalign.rollouts.engines.synced import SyncedSampler
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams

T = TypeVar("T")
ERRORS: tuple[type[Exception], ...] = (SamplerFailed, ValueError, OSError)


class RankZeroSampler:
    """Sampler shared by all ranks, which make the same calls with the same prompts.

    An error on rank 0 is raised on every rank, at the same call.

    `sampler` is None on the other ranks.
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
        """Version of the current policy."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        """Mark the policy as changed."""
        self._version = version
        if self._sampler is not None:
            self._sampler.version = version

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Return the completions of all prompts, on every rank.

        Raises:
            ValueError, SamplerFailed: if the sampler raised one on rank 0.
        """
        return self._all_do(lambda sampler: sampler.generate(prompt_ids, params, seed=seed))

    def begin(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> None:
        """Start to draw completions; see `OverlappedSampler`."""
        self._all_do(lambda sampler: sampler.begin(prompt_ids, params, seed=seed))

    def state(self) -> dict[str, Any]:
        """Return the state of `OverlappedSampler`."""
        return self._all_do(lambda sampler: sampler.state())

    def state_on_error(self, *, again: bool) -> dict[str, Any]:
        """Return that of `OverlappedSampler` on rank 0, {} on the others; no collective is used."""
        if isinstance(self._sampler, OverlappedSampler):
            return self._sampler.state_on_error(again=again)
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of `OverlappedSampler`."""
        self._all_do(lambda sampler: sampler.restore(state))

    def metrics(self) -> dict[str, float | int]:
        """Return the metrics of `SyncedSampler`."""
        return self._all_do(lambda sampler: sampler.metrics())

    def close(self) -> None:
        """End rank 0's sampler."""
        if self._sampler is not None:
            self._sampler.close()

    def _all_do(self, work: Callable[[Any], T]) -> T:
        """Return the work's result on rank 0; the others serve a sharded policy in the meantime."""
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
