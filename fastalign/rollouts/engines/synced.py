"""A sampler that keeps an engine at the policy's weights, checks it, and rebuilds it."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor

from fastalign.rollouts.engines.in_process import VllmSampler
from fastalign.rollouts.engines.options import SamplerName
from fastalign.rollouts.engines.policy_access import PolicyAccess
from fastalign.rollouts.engines.server import VllmServerSampler
from fastalign.rollouts.engines.spec import EngineSpec
from fastalign.rollouts.engines.weights import sync_folder
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams

# Completions after each sync that the trainer computes again: as many, or one of each server.
NUM_CHECKED = 4
CHECKED_TOKENS = 128  # of each at most
LARGEST_DIFFERENCE = 20.0  # nats, in place of the infinite one of a token that cannot be drawn
ENGINES: dict[str, type[VllmSampler | VllmServerSampler]] = {
    "vllm": VllmSampler,
    "vllm-server": VllmServerSampler,
}


class Engine(Protocol):
    """Interface of an engine: a `Sampler` with adapters, checks and a rebuild."""

    version: int | None
    """Version of its weights; None: it has none."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw completions; see `Sampler`."""

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's weights; the next completions have this `version`."""

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """Take over an adapter in peft's layout, on the weights that the engine has."""

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Return the names it does not compute with, and how many could be compared."""

    def needs_weights(self) -> bool:
        """Return True if `sync_weights` must come before the next `sync_adapter`."""

    def metrics(self) -> dict[str, float | int]:
        """Return metrics of its own since the last call."""

    def sleep(self) -> None:
        """Free memory until the next sync, if the engine can."""

    def rebuild(self) -> None:
        """Build a new engine in place of a broken one, without weights."""

    def close(self) -> None:
        """Free what it holds."""


class SyncedSampler:
    """Sampler of a policy by a separate engine; setting `version` marks the policy as changed.

    Before sampling, the engine gets the policy's weights (only the adapter, if there is one) unless
    it has this version. After the first sampling with new weights, the policy itself computes some
    tokens' log-probs again. An engine that dies or falls silent is built anew, and its work
    repeated.

    Args:
        policy: access to the policy.
        engine: engine to sample with.
        num_rebuilds: number of times in a row that a failed engine is built anew.
        max_difference: largest mean difference of log-probs, nats, at which a run goes on.
        adapter_folder: parent of the folders that adapters are written to; default: memory.
        num_checked: number of completions after each sync that the policy computes again.
        on_rebuild: called before a failed engine is built anew and its work begins again.
    """

    def __init__(
        self,
        policy: PolicyAccess,
        engine: Engine,
        *,
        num_rebuilds: int,
        max_difference: float,
        adapter_folder: str | None = None,
        num_checked: int = NUM_CHECKED,
        on_rebuild: Callable[[], None] = lambda: None,
    ):
        self._policy, self.engine = policy, engine
        self.num_checked = num_checked
        self._on_rebuild = on_rebuild
        self._num_rebuilds, self._max_difference = num_rebuilds, max_difference
        self._folder_for_adapters = adapter_folder
        self._adapter_folder: TemporaryDirectory[str] | None = None
        self._checked = False
        self._metrics: dict[str, float | int] = {}
        self.version = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw completions with the weights of `version`; see `Sampler`.

        Raises:
            ValueError: if the engine refuses a prompt or setting, or a weight is not finite.
            SamplerFailed: if the engine failed again after `num_rebuilds` rebuilds in a row, or
                computes with other weights than the policy's; the message names them.
        """
        for num_failures in range(self._num_rebuilds + 1):
            try:
                self._sync()
                found = self.engine.generate(prompt_ids, params, seed=seed)
                break
            except SamplerFailed as failure:
                if num_failures == self._num_rebuilds:
                    raise
                print(f"{failure}; it is built anew and its work repeated", flush=True)
            # Not above: the failure's frames keep the broken engine's memory.
            self._on_rebuild()
            self._count("sampling/num_rebuilds", 1)
            self.engine.rebuild()
        if not self._checked:
            self._check(prompt_ids, found, params)
        self.engine.sleep()
        return found

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Mark the policy's weights, which the tensors must be, as changed."""
        self.version = version

    def metrics(self) -> dict[str, float | int]:
        """Return differences, seconds and rebuilds since the last call."""
        found = {"sampling/num_rebuilds": 0, "time/sync_seconds": 0.0, **self._metrics}
        self._metrics = {}
        return found | self.engine.metrics()

    def close(self) -> None:
        """End the engine."""
        self.engine.close()
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()

    def _count(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0) + value

    def _sync(self) -> None:
        if self.engine.version == self.version:
            return
        start = time.perf_counter()
        has_adapter = self._policy.has_adapter
        if not has_adapter or self.engine.needs_weights():
            self.engine.sync_weights(self._policy.tensors(), self.version)
        if has_adapter:
            folder = sync_folder(self._folder_for_adapters)
            self._policy.save_adapter(folder.name)
            self.engine.sync_adapter(folder.name, self.version)
            if self._adapter_folder is not None:
                self._adapter_folder.cleanup()
            self._adapter_folder = folder  # the engine may read it again
        self._checked = False
        self._count("time/sync_seconds", time.perf_counter() - start)

    def _check(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Completion]],
        params: SamplingParams,
    ) -> None:
        """Compare some tokens' log-probs with the policy's own.

        Raises:
            SamplerFailed: if they differ by more than `max_difference` on average.
        """
        # Spread evenly, so that each of several servers, which have equal shares, is checked.
        number = min(self.num_checked, len(prompt_ids))
        places = [-(-len(prompt_ids) * n // number) for n in range(number)]
        sequences = [
            (list(prompt_ids[place]), completions[place][0].token_ids[:CHECKED_TOKENS])
            for place in places
        ]
        differences = []
        for place, ours in zip(places, self._policy.logprobs(sequences, params), strict=True):
            theirs = torch.tensor(completions[place][0].logprobs[:CHECKED_TOKENS])
            differences.append((ours.double().cpu() - theirs.double()).abs())
        difference = torch.cat(differences).clamp_max(LARGEST_DIFFERENCE).sort().values
        # Rounding may put a token at the edge of top_p on its other side: drop the largest 1 %.
        num_kept = max(1, len(difference) - max(1, len(difference) // 100))
        mean = difference[:num_kept].mean().item()
        name = "sampling/sampling_logp_difference"
        self._metrics |= {f"{name}/mean": mean, f"{name}/max": difference.max().item()}
        if mean > self._max_difference:
            raise SamplerFailed(self._describe(mean))
        self._checked = True

    def _describe(self, mean: float) -> str:
        names, num_compared = self.engine.differing_tensors(self._policy.tensors())
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"sampler: its log-probs are {mean:.3g} nats a token off the policy's on average, "
            f"expected at most {self._max_difference:g} (--vllm.max-difference); of "
            f"{num_compared} tensors compared it does not compute with: {shown or 'none'}"
        )


def open_engine(
    name: SamplerName,
    spec: EngineSpec,
    policy: PolicyAccess,
    *,
    on_progress: Callable[[int], None] | None = None,
    on_rebuild: Callable[[], None] = lambda: None,
) -> SyncedSampler:
    """Open the engine that `--sampler` names, kept at a policy's weights.

    Raises:
        ValueError: if vLLM is not installed, or cannot run this model or these settings.
        SamplerFailed: if the engine does not start, or there is no server in time.
    """
    limit = spec.options.max_difference
    if limit is None:
        limit = 1e-3 if spec.dtype == torch.float32 else 0.1
    return SyncedSampler(
        policy,
        ENGINES[name](spec, on_progress=on_progress),
        num_rebuilds=spec.options.num_rebuilds,
        max_difference=limit,
        adapter_folder=spec.options.sync_folder,
        num_checked=max(NUM_CHECKED, len(spec.options.url or ())),
        on_rebuild=on_rebuild,
    )
