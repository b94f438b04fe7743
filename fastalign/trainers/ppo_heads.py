"""Hidden states and heads of PPO's models, as the operations on heads take them."""

from dataclasses import replace

import torch
from torch import Tensor

from fastalign.batch import PackedBatch
from fastalign.models import (
    AttentionPlan,
    Head,
    adapter_off,
    enter,
    hidden_at,
    is_sharded,
    lm_head,
)
from fastalign.ops import linear_kl
from fastalign.trainers.compute import Compute


def head_options(head: Head, compute: Compute, temperature: float) -> dict[str, object]:
    """What the operations on heads take besides hidden states and weights."""
    return {
        "temperature": temperature,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "compute_dtype": compute.dtype if compute.dtype != torch.float32 else None,
        "max_buffer_bytes": compute.max_buffer_bytes,
    }


def hidden_and_head(
    model: object, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> tuple[Tensor, Head]:
    """Hidden states (N, D) that predict the sampled tokens, and the head that reads them."""
    with compute.autocast():
        hidden = hidden_at(model, batch, batch.predict_index, packing=compute.packing, plan=plan)
    return hidden, lm_head(model)


@torch.no_grad()
def reference_head(
    reference: object, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> tuple[Tensor, Head]:
    """`hidden_and_head` of the frozen model; of a sharded one the head is a copy that stays."""

    def of_reference() -> tuple[Tensor, Head]:
        hidden, head = hidden_and_head(reference, batch, compute, plan)
        if not is_sharded(reference):
            return hidden, head
        bias = None if head.bias is None else head.bias.clone()
        return hidden, replace(head, weight=head.weight.clone(), bias=bias)

    with adapter_off(reference):
        return enter(reference, of_reference)


def shared_plan(batch: PackedBatch, compute: Compute) -> AttentionPlan | None:
    """One plan of the batch's attention for every model; padded batches have none."""
    return None if compute.packing == "padded" else AttentionPlan(batch)


def both_heads(
    hidden: Tensor,
    head: Head,
    reference: Tensor,
    of_reference: Head,
    targets: Tensor,
    compute: Compute,
    temperature: float,
) -> dict[str, Tensor]:
    """Log-probs, entropy and the KL over the vocabulary, each (N,), in one pass over both heads."""
    both = linear_kl(
        hidden,
        head.weight,
        reference,
        of_reference.weight,
        targets,
        bias=head.bias,
        reference_bias=of_reference.bias,
        **head_options(head, compute, temperature),  # type: ignore[arg-type]
    )._asdict()
    both["full_kl"] = both.pop("kl")
    return both
