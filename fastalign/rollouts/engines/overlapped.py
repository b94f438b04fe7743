"""Sampling of the next step's completions, from this step's weights, while the policy trains."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastalign.rollouts.engines.synced import SyncedSampler
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams

CHECKED_TOKENS_BEFOREHAND = 16  # of the completions that are checked before a batch is begun


@dataclass
class _Begun:
    """Completions that are being drawn."""

    seed: int
    answers: "Future[list[list[Completion]]]"


class OverlappedSampler:
    """A `SyncedSampler` whose engine draws in the background what `begin` asked for.

    `generate` with the seed given to `begin` returns those completions, which are of the policy at
    that time (`Completion.version`). If the engine failed in between, they are drawn anew, from the
    current policy.
    """

    def __init__(self, sampler: SyncedSampler):
        self._sampler = sampler
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._begun: _Begun | None = None
        self._taken: _Begun | None = None  # what the latest `generate` returned of it

    @property
    def version(self) -> int:
        """Version of the current policy."""
        return self._sampler.version

    @version.setter
    def version(self, version: int) -> None:
        """Mark the policy as changed."""
        self._sampler.version = version

    def begin(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> None:
        """Start to draw what `generate` with this seed will return.

        Before this returns, the engine has the policy's weights and has been checked.

        Raises:
            ValueError, SamplerFailed: as `SyncedSampler.generate`.
        """
        few = replace(
            params,
            num_samples=1,
            max_new_tokens=min(params.max_new_tokens, CHECKED_TOKENS_BEFOREHAND),
        )
        self._sampler.generate(prompt_ids[: self._sampler.num_checked], few, seed=seed)
        answers = self._threads.submit(self._sampler.engine.generate, prompt_ids, params, seed=seed)
        self._begun = _Begun(seed, answers)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Return completions, those begun with this seed if there are any."""
        self._taken = None
        if self._begun is not None:
            failure = self._begun.answers.exception()  # the engine does one thing at a time
            if self._begun.seed == seed:
                begun, self._begun = self._begun, None
                if failure is None:
                    self._taken = begun
                    return begun.answers.result()
                if not isinstance(failure, SamplerFailed):
                    raise failure
                print(f"{failure}; its work is repeated", flush=True)
        return self._sampler.generate(prompt_ids, params, seed=seed)

    def metrics(self) -> dict[str, float | int]:
        """Return the metrics of `SyncedSampler`."""
        return self._sampler.metrics()

    def state(self) -> dict[str, Any]:
        """Wait for what was begun and return it for JSON; {} if there is nothing."""
        if self._begun is None or self._begun.answers.exception() is not None:
            return {}
        answers = self._begun.answers.result()
        rows = [[asdict(answer) for answer in of_prompt] for of_prompt in answers]
        return {"seed": self._begun.seed, "completions": rows}

    def state_on_error(self, *, again: bool) -> dict[str, Any]:
        """Return `state`, of a step that will be taken again with what `generate` returned to it.

        Args:
            again: whether the present step will be; else it is over.
        """
        if again:
            self._begun = self._taken
        return self.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if not state:
            return
        answers: Future[list[list[Completion]]] = Future()
        answers.set_result(
            [[Completion(**answer) for answer in of_prompt] for of_prompt in state["completions"]]
        )
        self._begun = _Begun(state["seed"], answers)

    def close(self) -> None:
        """End the engine when it has finished what was begun."""
        self._threads.shutdown(wait=True)
        self._sampler.close()
