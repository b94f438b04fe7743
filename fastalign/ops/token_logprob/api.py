"""`token_logprob`: log-probs of given tokens from logits."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastalign.ops.backends import BackendName, choose_backend
from fastalign.ops.head.arguments import check_targets, check_transform, temperature_tensor
from fastalign.ops.registration import register_rows
from fastalign.ops.token_logprob.reference import Inputs

RESULTS = ("logprob", "entropy", "maximum", "log_total")
token_logprob_forward = register_rows("token_logprob", Inputs, RESULTS, 2)


@overload
def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    backend: BackendName = ...,
) -> Tensor: ...


@overload
def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    backend: BackendName = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprob(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,) int64
    *,
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probs (T,) of `targets` and, if asked, entropies (T,) in nats.

    Equivalent to these lines, with one pass over the logits and no other (T, V) tensor:

        z = softcap * tanh(logits.float() / softcap) / temperature
        logprob = log_softmax(z, dim=-1)
        entropy = -(logprob.exp() * logprob).sum(-1)
        logprob = logprob[arange(T), targets]

    Differentiable in the logits, through both results.

    Args:
        logits: float32, bfloat16, float16, or float64 (reference only). Of an odd
            vocabulary Triton reads 128 bits at a time only where row strides are multiples of 16.
        targets: token ids; `ignore_index` gives log-prob 0, entropy 0 and no gradient.
        temperature: positive number, or one per row; gets no gradient.
        softcap: Gemma 2's final logit softcap (arXiv 2408.00118), or None.
        return_entropy: also return each row's entropy.
        ignore_index: target that marks a row to ignore.
        backend: "auto" takes native code where it was built, else Triton on a GPU, else the
            reference; a named backend runs or raises.

    Returns:
        Log-probs in float32 (float64 for float64 logits), or (log-probs, entropies).

    Raises:
        ValueError: if a shape, dtype, device, target or number is wrong, or the backend is
            unusable.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.dtype.itemsize < 2:
        raise ValueError(
            f"logits: expected a floating (T, V) tensor, got {logits.dtype} {tuple(logits.shape)}"
        )
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected V > 0, got {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 ({logits.shape[0]},), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets: expected on {logits.device}, got {targets.device}")
    check_targets(targets, logits.shape[1], ignore_index)
    check_transform(softcap, 1.0)
    rows = temperature_tensor(temperature, logits)
    if rows is not None:
        rows = rows.expand(logits.shape[0])
    chosen = choose_backend("token_logprob", backend, logits.device.type, logits.dtype)
    logprob, entropy, *_ = token_logprob_forward(
        logits, targets, rows, softcap, ignore_index, chosen
    )
    return (logprob, entropy) if return_entropy else logprob
