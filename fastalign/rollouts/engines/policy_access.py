"""Access of a synced sampler to the policy: weights, adapter, log-probs."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.models.lora import adapter_rank
from fastalign.models.lora_files import save_adapter
from fastalign.ranks.parallel import enter, is_sharded
from fastalign.ranks.whole_weights import whole
from fastalign.ranks.world import World
from fastalign.rollouts.distribution import recompute_logprobs
from fastalign.rollouts.engines.weights import policy_tensors
from fastalign.rollouts.sampler import SamplingParams

# Prompt ids and response ids.
Sequences = Sequence[tuple[list[int], list[int]]]


class PolicyAccess:
    """Access to a policy that is whole in this process.

    `mode` is a context manager that is entered around its forwards.
    """

    def __init__(self, model: Any, mode: Callable[[], AbstractContextManager[None]] = nullcontext):
        self._model, self._mode = model, mode

    @property
    def has_adapter(self) -> bool:
        """True if the policy has an adapter."""
        return adapter_rank(self._model) > 0

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Return `policy_tensors` of the policy."""
        return policy_tensors(self._model)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in peft's layout."""
        save_adapter(self._model, folder)

    def logprobs(self, sequences: Sequences, params: SamplingParams) -> list[Tensor]:
        """Compute the log-probs of each response (`recompute_logprobs`)."""
        with self._mode():
            return [recompute_logprobs(self._model, p, r, params) for p, r in sequences]


class ShardedAccess(PolicyAccess):
    """Access to a policy that is sharded over the ranks: rank 0 asks, the others join in."""

    def __init__(self, model: Any, mode: Callable[[], AbstractContextManager[None]], world: World):
        super().__init__(model, mode)
        self._world = world

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Return `policy_tensors`, gathered in rank 0's host memory."""
        self._world.of_first(("gather",))
        return self._gather()

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in peft's layout."""
        self._world.of_first(("save_adapter", folder))
        super().save_adapter(folder)

    def logprobs(self, sequences: Sequences, params: SamplingParams) -> list[Tensor]:
        """Return `recompute_logprobs` of each; all ranks compute it."""
        self._world.of_first(("logprobs", sequences, params))
        return self._logprobs(sequences, params)

    def serve(self) -> Any:
        """Do what rank 0 asks for, on another rank, until it sends `done`; return its result."""
        while True:
            asked: tuple[Any, ...] = self._world.of_first(())
            name, *arguments = asked
            if name == "done":
                return arguments[0]
            if name == "gather":
                self._gather()
            elif name == "save_adapter":
                super().save_adapter(*arguments)
            elif name == "logprobs":
                self._logprobs(*arguments)

    def _gather(self) -> list[tuple[str, Tensor]]:
        gathered = []
        for name, tensor in policy_tensors(self._model):
            plain = whole(tensor)
            if self._world.is_first:
                gathered.append((name, plain.cpu()))
        return gathered

    def _logprobs(self, sequences: Sequences, params: SamplingParams) -> list[Tensor]:
        with self._mode():
            return [self._logprob(prompt, response, params) for prompt, response in sequences]

    def _logprob(self, prompt: list[int], response: list[int], params: SamplingParams) -> Tensor:
        model = self._model
        with torch.no_grad():
            return enter(model, lambda: recompute_logprobs(model, prompt, response, params))


def access_to(
    model: Any, mode: Callable[[], AbstractContextManager[None]], world: World
) -> PolicyAccess:
    """Return the access to a policy, which may be sharded over the ranks."""
    sharded = is_sharded(model) and world.size > 1
    return ShardedAccess(model, mode, world) if sharded else PolicyAccess(model, mode)
