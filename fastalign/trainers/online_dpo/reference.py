"""The reference of an algorithm that samples: asked in every step, and at times renewed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.data import Tokenizer, check_same_vocabulary
from fastalign.models import adapter_off, has_adapter
from fastalign.models.logprobs import sequence_logprobs
from fastalign.ranks.parallel import is_sharded
from fastalign.runs.checkpoint.tensors import trainable_parameters
from fastalign.runs.load_models import load_model, share
from fastalign.runs.memory import memory_used_in
from fastalign.runs.state import TrainState
from fastalign.trainers.online_dpo.config import OnlineDPOConfig


class OnlineReference:
    """Another model; or the policy with its adapter off; or the policy with earlier weights.

    Args:
        config: of the run.
        policy: before its first step.
        tokenizer: of the policy.
        compute: how forwards are run.

    Raises:
        ValueError: another model's vocabulary is not the policy's.
    """

    def __init__(
        self, config: OnlineDPOConfig, policy: Any, tokenizer: Tokenizer, compute: Compute
    ):
        self._policy, self._compute = policy, compute
        self._every = config.reference.refresh_every
        self._other: Any = None
        self._weights: dict[str, Tensor] | None = None
        if config.reference.path is not None:
            self._other, its_own = load_model(config.reference.path, config.model, compute)
            check_same_vocabulary(tokenizer, its_own)
            share(self._other.requires_grad_(False), compute)
        elif not self._every and not has_adapter(policy):
            self._weights = copy_weights(policy)

    @property
    def began_as(self) -> Any:
        """The model whose weights a checkpoint does not hold and a resumed run must find again.

        None where there is no such: the policy's frozen base is watched by itself, and a renewed
        reference is in the checkpoint.
        """
        fixed = self._weights is not None and not self._every
        return self._policy if fixed else self._other

    def with_fewest_positions(self) -> Any:
        """The model that decides how long a prompt with its answer may be."""
        models = [self._policy] if self._other is None else [self._policy, self._other]
        return min(
            models, key=lambda m: getattr(m.config, "max_position_embeddings", None) or 2**31
        )

    def before_step(self, state: TrainState) -> None:
        """Renews the reference when it is due; what a checkpoint must hold of it is in `state`."""
        if self._every:
            if state.step % self._every == 0:
                state.reference = copy_weights(self._policy)
            self._weights = state.reference

    def logprobs(self, groups: Sequence[Group]) -> Tensor:
        """(R,) float32 on the CPU: the log-prob of every response."""
        if self._other is not None:
            return response_logprobs(self._other, groups, self._compute)
        weights = self._weights
        as_it_was = adapter_off(self._policy) if weights is None else put_in(self._policy, weights)
        with as_it_was:
            return response_logprobs(self._policy, groups, self._compute)


def response_logprobs(model: Any, groups: Sequence[Group], compute: Compute) -> Tensor:
    """(R,) float32 on the CPU: the log-prob of every response under a model as it stands."""
    with memory_used_in(f"log-probs, in batches of at most {compute.tokens_per_batch} tokens"):
        return torch.cat(sequence_logprobs(model, groups, compute))


def copy_weights(model: Any) -> dict[str, Tensor]:
    """What training changes of a model, as it is now."""
    return {name: value.clone() for name, value in trainable_parameters(model).items()}


@contextmanager
def put_in(model: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with other weights; its parameters are the same objects, and get theirs back."""
    parameters = {name: p for name, p in model.named_parameters() if name in weights}
    assert parameters.keys() == weights.keys()
    # Sharded parameters are gathered from where they lie: those are written over and restored.
    own = copy_weights(model) if is_sharded(model) else {k: p.data for k, p in parameters.items()}
    try:
        put(parameters, weights, copy=is_sharded(model))
        yield
    finally:
        put(parameters, own, copy=is_sharded(model))


@torch.no_grad()
def put(parameters: dict[str, Tensor], values: dict[str, Tensor], *, copy: bool) -> None:
    """Gives parameters these values: their bytes, or themselves."""
    for name, parameter in parameters.items():
        if copy:
            parameter.copy_(values[name])
        else:
            parameter.data = values[name]
