"""fastalign's head in place of the one that TRL's trainers attach to their models.

Since TRL 1.16 every loss of its trainers is computed from per-token results of a head:
`model(..., labels=labels, fused_lm_head=True)` returns log-probs, entropies and so on without
logits, once `trl.trainer.utils.add_fused_lm_head` has changed the model's forward. The function of
that name here has the same contract. So no loss, option or metric is written a second time.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from fastalign.models.architecture import backbone
from fastalign.models.head import check_head, lm_head
from fastalign.ops import LinearHead
from fastalign.ops.head.arguments import HeadOptions, check_call
from fastalign.ops.head.linear_logprob.api import head_logprob, read_head

# The function of TRL's that its trainers call by this name, in their own modules.
ATTACH = "add_fused_lm_head"
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class FusedHead:
    """Mixin for a trainer of TRL: its models get fastalign's head in place of TRL's.

    Losses, options, metrics and data stay TRL's code, which reads the head's results.

    Raises:
        ValueError: if the installed TRL has no such head, or something is asked for that this one
            does not have: a vision model, logits that `LinearHead` cannot make, weights sharded by
            FSDP, DeepSpeed ZeRO-3 or tensor parallelism.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with attached_heads(self, super().__init__.__module__) as models:
            super().__init__(*args, **kwargs)
        if not models:
            raise ValueError(f"trl {trl.__version__}: {type(self).__name__} attached no head")


@contextmanager
def attached_heads(trainer: Any, module: str) -> Iterator[list[Any]]:
    """Let a trainer's constructor, which `module` holds, attach our head.

    Yields:
        The models that got it so far.

    Raises:
        ValueError: if TRL has no such function, or weights will be sharded by FSDP.
    """
    names = vars(sys.modules[module])
    theirs, models = names.get(ATTACH), []
    if theirs is None:
        raise ValueError(
            f"trl: expected 1.16 or newer, whose trainers call {ATTACH}, got {trl.__version__}"
        )

    def attach(model: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "fsdp: expected none, as fastalign's head reads whole weights, got FSDP: use DDP"
            )
        add_fused_lm_head(model, *args, **kwargs)
        models.append(model)

    names[ATTACH] = attach
    try:
        yield models
    finally:
        names[ATTACH] = theirs


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Do what TRL's function of this name does, with fastalign's head.

    Args:
        model: transformers causal model.
        temperature: number that divides the logits.
        cast_lm_head_to_fp32: True if products are in float32, outside autocast.
        outputs: per-token results of the call, of `OUTPUTS`.

    Raises:
        ValueError: see `FusedHead`.
    """
    _check(model, outputs)
    reader = TokenReader(temperature, cast_lm_head_to_fp32, frozenset(outputs))
    model.forward = types.MethodType(_forward_with(model, reader), model)


def _check(model: Any, outputs: tuple[str, ...]) -> None:
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown:
        raise ValueError(
            f"trl {trl.__version__}: expected results of the head among {', '.join(OUTPUTS)}, "
            f"got {', '.join(unknown)}"
        )
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"model: expected one of text alone, got {type(model).__name__}")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "deepspeed: expected ZeRO stage 1 or 2, got stage 3, which shards the head"
        )
    if isinstance(model.get_output_embeddings().weight, DTensor):
        raise ValueError("model: expected a whole head, got one that is sharded")
    check_head(model)


def _forward_with(model: Any, reader: "TokenReader") -> Callable[..., Any]:
    """Return a model's forward that has TRL's keyword `fused_lm_head`."""
    from trl.trainer.utils import FusedCausalLMOutput

    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            given = {name: value for name, value in given.items() if value is not None}
            return original(*args, **given, **kwargs)
        body = backbone(self)(*args, **{**kwargs, "use_cache": False})
        hidden = body.last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        head = lm_head(self)
        found = reader.read(hidden.to(head.weight.device), head, shift_labels)
        mask = found["label_mask"]
        num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -found["log_probs"].sum() / num_items
        if not kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", 0)):
            return FusedCausalLMOutput(loss=loss, **found)
        aux_loss = router_loss(self.config, body.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, aux_loss=aux_loss, **found)

    return forward


@dataclass(frozen=True)
class TokenReader:
    """Reader of a head's per-token results, with one model's options.

    Attributes:
        temperature: number that divides the logits.
        in_float32: True if products are in float32, outside autocast.
        outputs: names of the results.
    """

    temperature: float
    in_float32: bool
    outputs: frozenset[str]

    # left to eager PyTorch, since the number of rows depends on the labels
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(self, hidden: Tensor, head: LinearHead, labels: Tensor) -> dict[str, Tensor]:
        """Return the results by TRL's names, each (B, S), zero where a label is -100.

        Rows without a label cost no product.

        Args:
            hidden: (B, S, D) hidden states that predict `labels`.
            head: vocabulary head.
            labels: (B, S) token ids.
        """
        labels = labels.to(hidden.device)
        mask = labels != -100
        rows, targets = hidden[mask], labels[mask]
        device = hidden.device.type
        if self.in_float32:
            rows = rows.float()
        in_autocast = torch.is_autocast_enabled(device) and not self.in_float32
        dtype = torch.get_autocast_dtype(device) if in_autocast else rows.dtype
        options = HeadOptions(self.temperature, -100, dtype, None, "auto")
        call = check_call(
            ATTACH, rows, head, targets, options, return_entropy="entropy" in self.outputs
        )
        log_probs, entropy, is_argmax = read_head(call)
        found = {"log_probs": log_probs, "entropy": entropy, "is_top1": is_argmax}
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if "mean_logits" in self.outputs:
                found["mean_logits"] = mean_logits(rows, head) / self.temperature
            if "log_sum_sq_probs" in self.outputs:
                # log sum p^2 = logsumexp(2 z) - 2 logsumexp(z): a log-prob at half the temperature
                half = HeadOptions(self.temperature / 2, -100, dtype, None, "auto")
                found["log_sum_sq_probs"] = (
                    2 * log_probs - head_logprob(rows, head, targets, half)[0]
                )
        wanted = {"log_probs", *self.outputs}
        return {
            # connected to the model even if no row has a label
            **{
                name: value.new_zeros(mask.shape).masked_scatter(mask, value)
                for name, value in found.items()
                if name in wanted
            },
            "label_mask": mask,
        }


def router_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Return the load-balancing loss of a mixture of experts, by transformers' own function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    num_experts, num_used = config.num_experts, config.num_experts_per_tok
    loss: Tensor = load_balancing_loss_func(router_logits, num_experts, num_used, attention_mask)
    return loss


def mean_logits(rows: Tensor, head: LinearHead) -> Tensor:
    """Return each row's mean logit (N,); with a softcap from the logits of 64 rows at once."""
    if head.softcap is None:
        return head.mean_logit(rows)
    parts = torch.split(rows.to(head.weight.dtype), 64)
    return torch.cat([head.logits(part).float().mean(-1) for part in parts])
