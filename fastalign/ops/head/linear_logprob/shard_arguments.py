"""Checks of a call whose head is shared by a process group, before anything is communicated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.ops.head.arguments import (
    LinearBackend,
    check_head,
    check_targets,
    check_transform,
    choose_linear_backend,
    resolve_compute_dtype,
    temperature_tensor,
)
from fastalign.ops.head.buffers import default_budget
from fastalign.ops.head.linear_head import LoraWeights
from fastalign.ops.head.linear_logprob.operands import HeadInputs, Needs, head_inputs
from fastalign.ops.head.products import product_dtype
from fastalign.ops.head.rank_agreement import checked_together
from fastalign.ops.head.vocabulary_shard import VocabularyShard


@dataclass(frozen=True)
class ShardedHead:
    """One call's arguments, as given by the caller: hidden, weight, bias, targets, transform."""

    shard: VocabularyShard
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    lora: LoraWeights | None
    compute_dtype: torch.dtype | None
    max_buffer_bytes: int | None
    backend: LinearBackend


@dataclass(frozen=True)
class CheckedHead:
    """What the checks made of them. Everything but the tensors is the same on every rank."""

    shard: VocabularyShard
    temperature: Tensor | None
    softcap: float | None
    logit_scale: float
    ignore_index: int
    dtype: torch.dtype
    budget: int
    needs: Needs
    backend: Literal["torch", "triton", "native"]

    def inputs(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
    ) -> HeadInputs:
        """The operands of a pass; `targets` stay global ids."""
        numbers = (self.softcap, self.logit_scale, self.ignore_index, self.dtype)
        of_lora = (lora_hidden, lora_weight)
        return head_inputs(hidden, weight, bias, targets, temperature, *numbers, *of_lora)


def checked_head(
    operation: str, head: ShardedHead, more: Callable[[], dict[str, Any]] = dict
) -> CheckedHead:
    """Checks the arguments on all ranks of the group together.

    Args:
        operation: The name of the public function.
        head: Its arguments.
        more: Checks what is left, and returns what of it must be the same on every rank.

    Raises:
        ValueError: As `linear_logprob`, and where ranks do not agree.
    """

    def check() -> tuple[CheckedHead, dict[str, Any]]:
        found = _checked(operation, head)
        facts = {
            "hidden.shape": tuple(head.hidden.shape),
            "vocab_size": head.shard.vocab_size,
            "largest": head.shard.num_planned_columns,
            "temperature": _told(head.temperature),
            "softcap": found.softcap,
            "logit_scale": found.logit_scale,
            "ignore_index": found.ignore_index,
            "lora": _told_lora(head.lora),
            "compute_dtype": str(found.dtype),
            "the products' dtype": str(product_dtype(found.dtype, head.hidden.device.type)),
            "max_buffer_bytes": found.budget,
            "backend": found.backend,
            "the gradients wanted": found.needs,
        }
        return found, {**facts, **more()}

    return checked_together(head.shard, check)


def _told(temperature: float | Tensor) -> str:
    """A number, or of a tensor its shape: its values may be on a GPU."""
    if isinstance(temperature, Tensor):
        return f"a tensor {tuple(temperature.shape)}"
    return str(float(temperature))


def _told_lora(lora: LoraWeights | None) -> str:
    """The rank and scaling."""
    return "None" if lora is None else f"rank {lora.lora_A.shape[0]}, scaling {lora.scaling}"


def _checked(operation: str, head: ShardedHead) -> CheckedHead:
    hidden, weight, shard = head.hidden, head.weight, head.shard
    shard.check(weight)
    check_head(hidden, weight, head.targets, head.bias, empty_shard=True)
    check_targets(head.targets, shard.vocab_size, head.ignore_index)
    check_transform(head.softcap, head.logit_scale)
    if head.lora is not None:
        head.lora.check(hidden, weight)
    dtype = resolve_compute_dtype(hidden, weight, head.compute_dtype)
    backend = choose_linear_backend(operation, head.backend, hidden.device.type, dtype)
    if backend == "reference":
        raise ValueError(
            f"backend: {operation} cannot run with 'reference' on a vocabulary's shard, as it wants"
            " every logit on one rank: use 'torch', which is PyTorch as well"
        )
    budget = head.max_buffer_bytes
    if budget is None:
        columns = shard.num_planned_columns
        budget = default_budget(columns, dtype, hidden.device, within_free_memory=False)
    return CheckedHead(
        shard,
        temperature_tensor(head.temperature, hidden),
        head.softcap,
        float(head.logit_scale),
        head.ignore_index,
        dtype,
        budget,
        _needs(head),
        backend,
    )


def _needs(head: ShardedHead) -> Needs:
    """Which gradients are wanted: of LoRA's operands, where they will need one."""
    of_lora = (False, False)
    if head.lora is not None:
        of_hidden = head.hidden.requires_grad or head.lora.lora_A.requires_grad
        of_lora = (of_hidden, head.lora.lora_B.requires_grad)
    leaves = (head.hidden, head.weight, head.bias)
    wanted = (*(leaf is not None and leaf.requires_grad for leaf in leaves), *of_lora)
    return Needs(*(torch.is_grad_enabled() and need for need in wanted))
