"""`linear_kl`: two models' hidden states to log-probs and KL without all the logits."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.arguments import (
    HeadOptions,
    LinearBackend,
    check_call,
    resolve_compute_dtype,
)
from fastalign.ops.head.linear_head import LinearHead, as_linear_head
from fastalign.ops.head.linear_kl.op import PairCall, linear_kl_forward
from fastalign.ops.head.linear_kl.reference import pair_statistics
from fastalign.ops.head.linear_logprob.reference import head_logits
from fastalign.ops.token_kl.api import KLDirection, is_over_reference


class LinearKL(NamedTuple):
    """Results of `linear_kl`, each (T,); zeros where the target is ignored.

    Attributes:
        logprob: policy's log-probs of the targets.
        reference_logprob: reference's log-probs of the targets, without gradient.
        entropy: policy's entropy, in nats.
        kl: KL divergence over the whole vocabulary, in nats.
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
    hidden: Tensor, head: LinearHead, reference_hidden: Tensor, reference: LinearHead
) -> None:
    """Check the reference's shapes, dtypes and devices beside the policy's.

    Raises:
        ValueError: if one is wrong, naming the argument, what was expected and what came.
    """
    num_rows, num_columns = hidden.shape[0], head.weight.shape[0]
    value, weight, bias = reference_hidden, reference.weight, reference.bias
    if value.ndim != 2 or value.shape[0] != num_rows or not value.is_floating_point():
        raise ValueError(
            f"reference_hidden: expected a floating ({num_rows}, E) tensor, got {value.dtype} "
            f"{tuple(value.shape)}"
        )
    width = value.shape[1]
    if weight.shape != (num_columns, width) or not weight.is_floating_point():
        raise ValueError(
            f"reference_weight: expected a floating ({num_columns}, {width}) tensor, got "
            f"{weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (num_columns,):
        raise ValueError(f"reference_bias: expected ({num_columns},), got {tuple(bias.shape)}")
    others = {"reference_hidden": value, "reference_weight": weight, "reference_bias": bias}
    for name, other in others.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(
                f"{name}: expected on {hidden.device} as hidden is, got {other.device}"
            )


def _check_dtype(
    dtype: torch.dtype,
    reference_hidden: Tensor,
    reference: LinearHead,
    compute_dtype: torch.dtype | None,
) -> None:
    """Check that both heads' products have one dtype.

    Raises:
        ValueError: if none is given and the reference's own is not the policy's.
    """
    found = resolve_compute_dtype(reference_hidden, reference.weight, compute_dtype)
    if found != dtype:
        raise ValueError(
            f"compute_dtype: expected one to be given, got None, and hidden is {dtype}, "
            f"reference_hidden {found}"
        )


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
    """Compute both log-probs of `targets`, the policy's entropy, and the KL, in one pass.

    The same as these lines, without their (T, V) tensors and with float32 logits throughout:

        logits = head(hidden, weight, bias)                # as in `linear_logprob`
        reference_logits = head(reference_hidden, reference_weight, reference_bias)
        log_p, log_q = log_softmax(logits, -1), log_softmax(reference_logits, -1)
        logprob, reference_logprob = log_p[arange(T), targets], log_q[arange(T), targets]
        entropy = -(log_p.exp() * log_p).sum(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)       # "reverse": KL(policy || reference)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)       # "forward": KL(reference || policy)

    See `token_kl` for the two directions and for the KL with banned tokens. Temperature,
    softcap and logit scale are those of both heads.

    Differentiable in hidden, weight and bias, through logprob, entropy and kl; the reference is a
    constant, and may be the same tensors. What the backward needs (the derivatives of logprob and
    kl by the products) is saved for as many rows as `max_buffer_bytes` holds. Products, in FLOPs
    over T*D*V where E = D:

        no gradient                                 4
        trained head     rows saved: 8              others: 12, their logits are computed again
        only hidden      rows saved: 6              others: 8, all in the forward
        a differentiated entropy recomputes all     trained head: 12   only hidden: 10 and 14

    Args:
        hidden: (T, D) policy's hidden states, any float dtype, any strides.
        weight: (V, D) weight of the policy's head, or a `LinearHead` without adapter and shard.
        reference_hidden: (T, E) reference's hidden states; their width may be another.
        reference_weight: (V, E) weight of the reference's head, or a `LinearHead`; may be `weight`.
        targets: (T,) token ids; `ignore_index` gives zeros and no gradient.
        direction: "reverse" (the penalty of RLHF) or "forward" (distillation).
        reference_bias: (V,) bias of the reference's head.
        max_buffer_bytes: most memory for both heads' logits, scratch and saved derivatives
            together. None: twice what `linear_logprob` takes, halved until it is at most half of
            the free memory.

    The keywords `bias`, `softcap` and `logit_scale` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype` and `backend` are
    those of :func:`fastalign.linear_logprob`.

    Returns:
        Four (T,) in float32, or float64 where products are in float64.

    Raises:
        ValueError: if a shape, dtype, device, target, number or backend is wrong, or the budget is
            too small.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale)
    reference = _reference_head(head, reference_weight, reference_bias)
    over_reference = is_over_reference(direction)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    policy = check_call("linear_kl", hidden, head, targets, options, num_heads=2)
    _check_reference(hidden, head, reference_hidden, reference)
    _check_dtype(policy.compute_dtype, reference_hidden, reference, compute_dtype)
    other = policy._replace(
        hidden=reference_hidden.detach(),
        weight=reference.weight.detach(),
        bias=None if reference.bias is None else reference.bias.detach(),
    )
    if policy.backend == "reference":
        logits = (head_logits(policy), head_logits(other))
        return LinearKL(*pair_statistics(*logits, targets, ignore_index, over_reference))
    call = PairCall(
        policy.hidden,
        policy.weight,
        policy.bias,
        other.hidden,
        other.weight,
        other.bias,
        policy.targets,
        policy.temperature,
        over_reference,
        policy.softcap,
        policy.logit_scale,
        policy.ignore_index,
        policy.compute_dtype,
        policy.max_buffer_bytes,
        policy.needs[:3],
        policy.backend,
    )
    return LinearKL(*linear_kl_forward(*call)[:4])
