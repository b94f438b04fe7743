"""The reference of online DPO: evaluated in every step, and renewed at intervals."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.compute import Compute, memory_used_in, require_finite
from fastalign.data.tokenizer import Tokenizer, check_same_vocabulary
from fastalign.models.forward import sequence_logprobs
from fastalign.models.lora import as_reference, has_adapter
from fastalign.progress import phase
from fastalign.ranks.parallel import is_sharded
from fastalign.runs.inputs import load_model, share
from fastalign.runs.state import TrainState, trainable_parameters
from fastalign.trainers.online_dpo.config import OnlineDPOConfig


class OnlineReference:
    """Another model; or the policy with its adapter off; or the policy with earlier weights.

    Raises:
        ValueError: if another model's vocabulary is not the policy's.
    """

    def __init__(
        self, config: OnlineDPOConfig, policy: Any, tokenizer: Tokenizer, compute: Compute
    ):
        self._policy, self._compute = policy, compute
        self._every = config.reference.refresh_every
        self.other: Any = None
        self._weights: dict[str, Tensor] | None = None
        if config.reference.path is not None:
            self.other, its_own = load_model(config.reference.path, config.model, compute)
            check_same_vocabulary(tokenizer, its_own)
            share(self.other.requires_grad_(False), compute)
        elif not self._every and not has_adapter(policy):
            self._weights = copy_weights(policy)

    @property
    def began_as(self) -> Any:
        """The model whose weights a checkpoint does not hold and a resumed run must find again.

        None where there is no such: the policy's frozen base is watched by itself, and a renewed
        reference is in the checkpoint.
        """
        fixed = self._weights is not None and not self._every
        return self._policy if fixed else self.other

    def before_step(self, state: TrainState) -> None:
        """Renew the reference when it is due; `state` then holds its weights for checkpoints."""
        if self._every:
            if state.step % self._every == 0:
                state.reference = copy_weights(self._policy)
            self._weights = state.reference

    def logprobs(self, groups: Sequence[Group]) -> Tensor:
        """Return the log-prob of every response, (R,) float32 on the CPU."""
        if self.other is not None:
            return response_logprobs(self.other, groups, self._compute)
        weights = self._weights
        policy = self._policy
        with as_reference(policy) if weights is None else swapped_weights(policy, weights):
            return response_logprobs(policy, groups, self._compute)


def response_logprobs(model: Any, groups: Sequence[Group], compute: Compute) -> Tensor:
    """Return the log-prob of every response under a model as it is, (R,) float32 on the CPU."""
    number = sum(len(group.response_ids) for group in groups)
    with (
        memory_used_in(f"log-probs, in batches of at most {compute.tokens_per_batch} tokens"),
        phase("log-probs of the samples", number, "responses"),
    ):
        found = torch.cat(sequence_logprobs(model, groups, compute))
    require_finite(found, "log-probs of the step's samples")
    return found


def copy_weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of the weights that training changes."""
    return {name: value.clone() for name, value in trainable_parameters(model).items()}


@contextmanager
def swapped_weights(model: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """Put other weights into the model for a while; its parameters stay the same objects."""
    parameters = {name: p for name, p in model.named_parameters() if name in weights}
    assert parameters.keys() == weights.keys()
    # Sharded parameters are gathered from where they lie: those are written over and restored.
    own = copy_weights(model) if is_sharded(model) else {k: p.data for k, p in parameters.items()}
    try:
        assign_weights(parameters, weights, copy=is_sharded(model))
        yield
    finally:
        assign_weights(parameters, own, copy=is_sharded(model))


@torch.no_grad()
def assign_weights(parameters: dict[str, Tensor], values: dict[str, Tensor], *, copy: bool) -> None:
    """Assign values to parameters: copy their bytes, or replace the storage."""
    for name, parameter in parameters.items():
        if copy:
            parameter.copy_(values[name])
        else:
            parameter.data = values[name]
