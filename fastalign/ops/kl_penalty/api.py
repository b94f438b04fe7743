"""`kl_penalty`: KL estimates per token, and the reward that PPO maximises.

Legend: N tokens of R responses, packed end to end.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastalign.ops.backends import BackendName, choose_backend
from fastalign.ops.kl_penalty.op import kl_penalty_forward
from fastalign.ops.kl_penalty.reference import last_tokens
from fastalign.ops.packed_arguments import check_device, check_packed, compute_dtype

Estimator = Literal["k1", "k2", "k3"]
MAX_K3 = 10.0  # largest estimate of k3, as in verl and NeMo-RL


class KLPenalty(NamedTuple):
    """Result of `kl_penalty`."""

    reward: Tensor
    """(N,), detached: -coefficient * kl, plus each response's score at its last token."""
    kl: Tensor
    """(N,), the estimate at each token; 0 where the mask is false."""
    sequence_kl: Tensor
    """(R,), the sums of `kl`."""


def kl_penalty(
    logprob: Tensor,  # (N,)
    reference_logprob: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,) integer
    score: Tensor | None = None,  # (R,)
    *,
    coefficient: float | Tensor,  # or ()
    estimator: Estimator = "k1",
    mask: Tensor | None = None,  # (N,) bool
    max_k3: float = MAX_K3,
    backend: BackendName = "auto",
) -> KLPenalty:
    """Return KL estimates of sampled tokens and the shaped reward of RLHF, for packed responses.

    Equivalent to these lines, in one pass and with sums accumulated in float64:

        x = logprob - reference_logprob
        y = x.clamp(min=-20)
        kl = {"k1": x, "k2": x**2 / 2, "k3": (expm1(-y) + y).clamp(max=max_k3)}[estimator]
        kl = where(mask, kl, 0)
        sequence_kl = stack([part.sum() for part in kl.split(lengths)])
        reward = -coefficient * kl.detach()
        reward[last_token] += score

    The reward is that of Ziegler et al. (arXiv 1909.08593, eq. 2) and InstructGPT (arXiv
    2203.02155, eq. 2), with the log-ratio spread over the tokens; the estimators are those of
    Schulman, "Approximating KL divergence" (2020). `kl` and `sequence_kl` are differentiable in
    `logprob`, for a KL in the loss: on samples of the policy, k2's gradient is that of
    KL(policy || reference) in expectation, k3's that of KL(reference || policy), and k1's is zero.
    `reward` is detached: it is data to PPO.

    Args:
        logprob: log-probs of the sampled tokens under the policy: float32, bfloat16, float16, or
            float64 (reference only).
        reference_logprob: log-probs under the reference; no gradient flows.
        bounds: token bounds that rise from 0 to N; response r is bounds[r]..bounds[r + 1].
        score: one reward a response, added at its last token whose mask is true; no gradient.
        coefficient: weight of the KL, not negative; a tensor () can be adapted without waiting for
            a GPU.
        estimator: "k1", "k2" or "k3".
        mask: tokens that count; the others have no KL, no reward and no gradient, whatever their
            log-probs.
        max_k3: largest estimate of k3, whose exponential would overflow; the bounds are those of
            verl and NeMo-RL. A token above it has this KL and no gradient, as through a clamp.
            k1 and k2 have no exponential and no bound.
        backend: "auto" takes native code where it was built, else Triton on a GPU, else the
            reference; a named backend runs or raises.

    Returns:
        Reward, kl and sequence_kl, in float32 (float64 for float64 log-probs).

    Raises:
        ValueError: if a shape, dtype, device or number is wrong, or the backend is unusable; on a
            CPU, also if bounds are wrong, or a scored response has no token that counts. On a GPU
            and in compiled code that response's sequence_kl is NaN.
    """
    tokens = {"logprob": logprob, "reference_logprob": reference_logprob}
    check_packed(bounds, tokens, {"score": score})
    if estimator not in get_args(Estimator):
        known = ", ".join(map(repr, get_args(Estimator)))
        raise ValueError(f"estimator: expected one of {known}, got {estimator!r}")
    if not max_k3 > 0:
        raise ValueError(f"max_k3: expected a positive number, got {max_k3}")
    _check_mask(mask, logprob)
    if score is not None:
        _check_scored(bounds, mask, len(logprob))
    dtype = compute_dtype(logprob)
    constant, adaptive = _coefficient(coefficient, logprob, dtype)
    results = kl_penalty_forward(
        logprob.to(dtype),
        reference_logprob.detach().to(dtype),
        bounds.to(torch.int64),
        None if score is None else score.detach().to(dtype),
        constant,
        adaptive,
        mask,
        estimator,
        float(max_k3),
        choose_backend("kl_penalty", backend, logprob.device.type, logprob.dtype),
    )
    return KLPenalty(*results)


def _check_mask(mask: Tensor | None, logprob: Tensor) -> None:
    if mask is None:
        return
    if mask.shape != logprob.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool ({len(logprob)},), got {mask.dtype} {tuple(mask.shape)}"
        )
    check_device("mask", mask, "logprob", logprob)


def _check_scored(bounds: Tensor, mask: Tensor | None, num_tokens: int) -> None:
    """Check on a CPU that every score has a token to be added to."""
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _, found = last_tokens(bounds, mask, num_tokens)
    if not bool(found.all()):
        response = int(found.logical_not().nonzero()[0])
        raise ValueError(
            "score: expected every response to have a token that counts, got response "
            f"{response} with none"
        )


def _coefficient(
    coefficient: float | Tensor, logprob: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """Return the coefficient as a number and None, or as 0 and the tensor that replaces it."""
    is_tensor = isinstance(coefficient, Tensor)
    if isinstance(coefficient, Tensor):
        if coefficient.ndim != 0 or coefficient.requires_grad:
            raise ValueError(
                "coefficient: expected a number or a tensor () without gradient, got "
                f"{tuple(coefficient.shape)} with requires_grad={coefficient.requires_grad}"
            )
        check_device("coefficient", coefficient, "logprob", logprob)
    known = not is_tensor or (logprob.device.type == "cpu" and not torch.compiler.is_compiling())
    if known and not 0 <= float(coefficient) < float("inf"):
        raise ValueError(
            f"coefficient: expected a finite number that is not negative, got {float(coefficient)}"
        )
    if isinstance(coefficient, Tensor):
        return 0.0, coefficient.to(dtype)
    return float(coefficient), None
