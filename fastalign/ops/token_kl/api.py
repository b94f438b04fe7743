"""`token_kl`: the KL divergence at each token, from two models' logits."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastalign.ops.backends import BackendName, choose_backend
from fastalign.ops.head.arguments import check_transform, temperature_tensor
from fastalign.ops.registration import register_rows
from fastalign.ops.token_kl.reference import Inputs

KLDirection = Literal["reverse", "forward"]


RESULTS = ("kl", "maximum", "log_total", "reference_maximum", "reference_log_total")
token_kl_forward = register_rows("token_kl", Inputs, RESULTS, 1)


def is_over_reference(direction: str) -> bool:
    """Return True if the KL's expectation is over the reference ("forward").

    Raises:
        ValueError: if the direction is unknown.
    """
    if direction not in get_args(KLDirection):
        raise ValueError(f"direction: expected 'reverse' or 'forward', got {direction!r}")
    return direction == "forward"


def _check(logits: Tensor, reference_logits: Tensor, ignored: Tensor | None) -> None:
    for name, value in (("logits", logits), ("reference_logits", reference_logits)):
        if value.ndim != 2 or not value.is_floating_point() or value.dtype.itemsize < 2:
            raise ValueError(
                f"{name}: expected a floating (T, V) tensor, got {value.dtype} {tuple(value.shape)}"
            )
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected V > 0, got {tuple(logits.shape)}")
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits: expected {tuple(logits.shape)} as logits have, "
            f"got {tuple(reference_logits.shape)}"
        )
    if ignored is not None and (ignored.shape != logits.shape[:1] or ignored.dtype != torch.bool):
        raise ValueError(
            f"ignored: expected bool ({logits.shape[0]},), got {ignored.dtype} "
            f"{tuple(ignored.shape)}"
        )
    for name, other in (("reference_logits", reference_logits), ("ignored", ignored)):
        if other is not None and other.device != logits.device:
            raise ValueError(f"{name}: expected on {logits.device}, got {other.device}")


def token_kl(
    logits: Tensor,  # (T, V)
    reference_logits: Tensor,  # (T, V)
    *,
    direction: KLDirection = "reverse",
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    ignored: Tensor | None = None,  # (T,) bool
    backend: BackendName = "auto",
) -> Tensor:
    """Return the KL divergence (T,) in nats between policy and reference over the vocabulary.

    With p the policy's softmax and q the reference's, for each token:

        reverse: KL(policy || reference) = sum_v p_v (log p_v - log q_v)
        forward: KL(reference || policy) = sum_v q_v (log q_v - log p_v)

    "reverse" is the penalty of RLHF (Ziegler et al. 2019, arXiv 1909.08593, eq. 2), exact instead
    of sampled; "forward" is that of distillation (Hinton et al. 2015, arXiv 1503.02531).
    Equivalent to these lines, with one pass over both and no other (T, V) tensor:

        z = softcap * tanh(logits.float() / softcap) / temperature
        r = softcap * tanh(reference_logits.float() / softcap) / temperature
        log_p, log_q = log_softmax(z, dim=-1), log_softmax(r, dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # reverse
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # forward

    but never negative. A banned token (-inf, or lower than the row's largest logit by 1e30) has
    probability 0. Banned by the side of the expectation, it adds nothing; banned only by the other
    side, it makes the KL inf and its row's gradient NaN. Differentiable in `logits` alone: the
    reference is a constant.

    Args:
        logits: logits of the policy: float32, bfloat16, float16, or float64 (reference only). Of
            an odd vocabulary Triton reads 128 bits at a time only where row strides, of both
            sides, are multiples of 16.
        reference_logits: logits of the reference model; the dtype may differ.
        direction: "reverse" or "forward", as above.
        temperature: positive number, or one per row, for both sides; gets no gradient.
        softcap: Gemma 2's final logit softcap (arXiv 2408.00118) for both sides, or None.
        ignored: rows that get KL 0 and no gradient, whatever they hold.
        backend: "auto" takes native code where it was built, else Triton on a GPU, else the
            reference; a named backend runs or raises.

    Returns:
        KL in float32 (float64 where either side is float64).

    Raises:
        ValueError: if a shape, dtype, device or number is wrong, or the backend is unusable.
    """
    _check(logits, reference_logits, ignored)
    over_reference = is_over_reference(direction)
    check_transform(softcap, 1.0)
    rows = temperature_tensor(temperature, logits)
    if rows is not None:
        rows = rows.expand(logits.shape[0])
    wide = torch.float64 in (logits.dtype, reference_logits.dtype)
    dtype = torch.float64 if wide else logits.dtype
    chosen = choose_backend("token_kl", backend, logits.device.type, dtype)
    kl: Tensor = token_kl_forward(
        logits, reference_logits.detach(), rows, ignored, softcap, over_reference, chosen
    )[0]
    return kl
