"""`linear_kl`: two models' hidden states to log-probs and KL without all the logits."""

from dataclasses import replace
from typing import NamedTuple

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
from fastalign.ops.head.linear_head import LinearHead, as_linear_head
from fastalign.ops.head.linear_kl.op import linear_kl_forward
from fastalign.ops.head.linear_kl.reference import pair_statistics
from fastalign.ops.head.linear_logprob.reference import head_logits
from fastalign.ops.token_kl.api import KLDirection, is_over_reference


class LinearKL(NamedTuple):
    """What `linear_kl` returns, each (T,); zeros where the target is ignored.

    Attributes:
        logprob: The policy's log-probs of the targets.
        reference_logprob: The reference's, which have no gradient.
        entropy: The policy's entropy, in nats.
        kl: The KL divergence over the whole vocabulary, in nats.
    """

    logprob: Tensor
    reference_logprob: Tensor
    entropy: Tensor
    kl: Tensor


def _reference_head(
    head: LinearHead, weight: Tensor | LinearHead, bias: Tensor | None
) -> LinearHead:
    """Return the reference's head, once it and the policy's are ones that this operation reads.

    Raises:
        ValueError: if a head has an adapter or a shard, or the two transform logits differently.
    """
    reference = weight
    if not isinstance(reference, LinearHead):
        reference = replace(head, weight=reference, bias=bias, lora=None, shard=None)
    elif bias is not None and reference.bias is not None:
        raise ValueError("reference_bias: expected none beside a LinearHead that holds a bias")
    elif bias is not None:
        reference = replace(reference, bias=bias)
    for name, each in (("weight", head), ("reference_weight", reference)):
        if each.lora is not None or each.shard is not None:
            field = "lora" if each.shard is None else "shard"
            raise ValueError(f"{name}: linear_kl expected a head without {field}, got one with it")
    ours, theirs = ((each.softcap, each.logit_scale) for each in (head, reference))
    if ours != theirs:
        raise ValueError(
            "reference_weight: expected a head with the policy's softcap and logit_scale "
            f"{ours}, got {theirs}"
        )
    return reference


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Checks the reference's shapes, dtypes and devices beside the policy's.

    Raises:
        ValueError: With the argument, what was expected and what came.
    """
    num_rows, num_columns = hidden.shape[0], weight.shape[0]
    value = reference_hidden
    if value.ndim != 2 or value.shape[0] != num_rows or not value.is_floating_point():
        raise ValueError(
            f"reference_hidden: expected a floating ({num_rows}, E) tensor, got {value.dtype} "
            f"{tuple(value.shape)}"
        )
    width = reference_hidden.shape[1]
    if reference_weight.shape != (num_columns, width) or not reference_weight.is_floating_point():
        raise ValueError(
            f"reference_weight: expected a floating ({num_columns}, {width}) tensor, got "
            f"{reference_weight.dtype} {tuple(reference_weight.shape)}"
        )
    if bias is not None and bias.shape != (num_columns,):
        raise ValueError(f"reference_bias: expected ({num_columns},), got {tuple(bias.shape)}")
    others = {"reference_hidden": reference_hidden, "reference_weight": reference_weight}
    for name, other in {**others, "reference_bias": bias}.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(
                f"{name}: expected on {hidden.device} as hidden is, got {other.device}"
            )


def _resolve_dtype(
    heads: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], compute_dtype: torch.dtype | None
) -> torch.dtype:
    """The products' dtype, the same for both heads.

    Raises:
        ValueError: None is asked and the two heads' own differ, or it is not a float dtype.
    """
    policy, reference = (resolve_compute_dtype(*head, compute_dtype) for head in heads)
    if policy != reference:
        raise ValueError(
            f"compute_dtype: expected one to be given, got None, and hidden is {policy}, "
            f"reference_hidden {reference}"
        )
    return policy


def linear_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    reference_hidden: Tensor,  # (T, E)
    reference_weight: Tensor | LinearHead,  # (V, E)
    targets: Tensor,  # (T,) int64
    *,
    direction: KLDirection = "reverse",
    bias: Tensor | None = None,  # (V,)
    reference_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
    backend: LinearBackend = "auto",
) -> LinearKL:
    """Two heads in one pass: both log-probs of `targets`, the policy's entropy, and the KL.

    The same as these lines, without their (T, V) tensors and with float32 logits throughout:

        logits = head(hidden, weight, bias)                # as in `linear_logprob`
        reference_logits = head(reference_hidden, reference_weight, reference_bias)
        log_p, log_q = log_softmax(logits, -1), log_softmax(reference_logits, -1)
        logprob, reference_logprob = log_p[arange(T), targets], log_q[arange(T), targets]
        entropy = -(log_p.exp() * log_p).sum(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)       # "reverse": KL(policy || reference)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)       # "forward": KL(reference || policy)

    `token_kl` says more of the two directions, and what the KL is with banned tokens. Temperature,
    softcap and logit scale are those of both heads.

    Differentiable in hidden, weight and bias, through logprob, entropy and kl; the reference is a
    constant, and may be the same tensors. What the backward wants (the derivatives of logprob and
    kl by the products) is kept for as many rows as `max_buffer_bytes` holds. Products, in FLOPs
    over T*D*V where E = D:

        no gradient                                 4
        trained head     rows kept: 8               others: 12, their logits are computed again
        only hidden      rows kept: 6               others: 8, all in the forward
        a differentiated entropy recomputes all     trained head: 12   only hidden: 10 and 14

    Args:
        hidden: The policy's hidden states, any float dtype, any strides.
        weight: The policy's head, or its weight.
        reference_hidden: The reference's hidden states; their width may be another.
        reference_weight: The reference's head, or its weight, for the same vocabulary; may be
            `weight`.
        targets: Token ids; `ignore_index` gives zeros and no gradient.
        direction: "reverse" (the penalty of RLHF) or "forward" (distillation).
        bias: The policy's bias.
        reference_bias: The reference's bias.
        temperature: A positive number, or one per row; gets no gradient.
        softcap: Gemma 2's final logit softcap (arXiv 2408.00118), or None.
        logit_scale: Cohere's multiplier, or one over Granite's divisor.
        ignore_index: The target that is ignored.
        compute_dtype: The products' dtype. None: autocast's where it is on, else the operands'.
        max_buffer_bytes: The most memory for both heads' logits, scratch and kept derivatives
            together. None: twice what `linear_logprob` takes, halved until it is at most half of
            the free memory.
        backend: What reads the logits, tile by tile: "native" (C++ or CUDA), "triton" or "torch";
            "auto" takes the first that is usable here, a named one runs or raises.
            "reference": the lines above.

    Returns:
        Four (T,) in float32, or float64 where products are in float64.

    Raises:
        ValueError: A wrong shape, dtype, device, target, number or backend, or too small a budget.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale)
    reference = _reference_head(head, reference_weight, reference_bias)
    weight, bias, softcap, logit_scale = head.weight, head.bias, head.softcap, head.logit_scale
    reference_weight, reference_bias = reference.weight, reference.bias
    check_head(hidden, weight, targets, bias)
    _check_reference(hidden, weight, reference_hidden, reference_weight, reference_bias)
    check_targets(targets, weight.shape[0], ignore_index)
    check_transform(softcap, logit_scale)
    over_reference = is_over_reference(direction)
    heads = ((hidden, weight), (reference_hidden, reference_weight))
    dtype = _resolve_dtype(heads, compute_dtype)
    rows = temperature_tensor(temperature, hidden)
    chosen = choose_linear_backend("linear_kl", backend, hidden.device.type, dtype)
    reference_hidden, reference_weight = reference_hidden.detach(), reference_weight.detach()
    reference_bias = None if reference_bias is None else reference_bias.detach()
    if chosen == "reference":
        options = (rows, softcap, logit_scale, dtype)
        logits = head_logits(hidden, weight, bias, *options)
        others = head_logits(reference_hidden, reference_weight, reference_bias, *options)
        ignored = targets == ignore_index
        places = targets.masked_fill(ignored, 0)
        return LinearKL(*pair_statistics(logits, others, places, ignored, over_reference))
    if max_buffer_bytes is None:
        max_buffer_bytes = default_budget(2 * weight.shape[0], dtype, hidden.device)
    needs = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad
        for leaf in (hidden, weight, bias)
    ]
    found = linear_kl_forward(
        hidden,
        weight,
        bias,
        reference_hidden,
        reference_weight,
        reference_bias,
        targets,
        rows,
        over_reference,
        softcap,
        float(logit_scale),
        ignore_index,
        dtype,
        max_buffer_bytes,
        needs,
        chosen,
    )
    return LinearKL(*found[:4])
