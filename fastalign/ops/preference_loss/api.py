"""`preference_loss`: the loss of each preference pair, from per-token log-probs."""

import torch
from torch import Tensor

from fastalign.ops.backends import BackendName, choose_backend
from fastalign.ops.preference_loss import reference
from fastalign.ops.preference_loss.formula import PreferenceFormula
from fastalign.ops.preference_loss.op import preference_loss_forward
from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.ops.segments import check_bounds


def preference_loss(
    logprob: Tensor,  # (N,)
    bounds: Tensor,  # (2B + 1,) integers
    formula: PreferenceFormula,
    reference_logprob: Tensor | None = None,  # (2B,)
    *,
    length: Tensor | None = None,  # (2B,) integers
    tie: Tensor | None = None,  # (B,) bool
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """Return losses (B,) of preference pairs, and the log-probs (2B,) of their sequences.

    Equivalent to these lines, for any preference loss of `fastalign.losses`, in one launch that
    also computes the derivatives, so that the backward is only one more:

        sums = stack([part.sum(dtype=float64) for part in logprob.split(lengths)]).float()
        h = (sums - reference_logprob)[0::2] - (sums - reference_logprob)[1::2]
        losses = -logsigmoid(beta * h)  # for `formula(dpo, beta=beta)`

    Differentiable in `logprob`, through both results: each token's gradient is its sequence's. The
    loss is computed from the log-probs as they are returned, rounded once, so DPO's loss of a
    policy that equals its reference is exactly ln 2.

    Args:
        logprob: log-probs of tokens, float32, or float64 (reference only); 0 for a token that does
            not count.
        bounds: row bounds of the sequences in the order chosen, rejected, chosen, ..., from 0 to
            N; they are checked on a CPU only.
        formula: loss with its parameters, from `fastalign.losses.formula`.
        reference_logprob: the reference model's log-prob of each sequence, if and only if the
            formula compares with a reference; gets no gradient.
        length: number of tokens that count in each sequence; None: all its rows.
        tie: pairs that are ties, for formulas that distinguish them; None: no pair is.
        backend: "auto" takes native code where it was built, else Triton on a GPU, else the
            reference; a named backend runs or raises. A formula without a kernel takes the
            reference.

    Returns:
        (losses, sequence log-probs), in the dtype of `logprob`.

    Raises:
        ValueError: if a shape, dtype or device is wrong, bounds do not rise from 0 to N, a
            reference is missing, a reference or ties are given to a formula without, or the
            backend is unusable.
    """
    if logprob.ndim != 1 or logprob.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprob: expected float32 or float64 (N,), got {logprob.dtype} {tuple(logprob.shape)}"
        )
    check_bounds(bounds, logprob.shape[0])
    if bounds.shape[0] % 2 == 0:
        raise ValueError(f"bounds: expected 2B + 1, an odd number, got {bounds.shape[0]}")
    _check_use(formula, reference_logprob, tie)
    num_sequences = bounds.shape[0] - 1
    for name, value, shape, kind in (
        ("bounds", bounds, bounds.shape, "integer"),
        ("reference_logprob", reference_logprob, (num_sequences,), "floating"),
        ("length", length, (num_sequences,), "integer"),
        ("tie", tie, (num_sequences // 2,), "bool"),
    ):
        if value is not None:
            _check_tensor(name, value, shape, kind, logprob.device)
    kernel = formula.kernel
    if kernel is None and backend not in ("auto", "reference"):
        raise ValueError(
            f"backend: expected 'auto' or 'reference', for no kernel computes {formula.name}, "
            f"got {backend!r}"
        )
    backend = "reference" if kernel is None else backend
    chosen = choose_backend("preference_loss", backend, logprob.device.type, logprob.dtype)
    if reference_logprob is not None:
        reference_logprob = reference_logprob.detach()
    if kernel is None or chosen == "reference":
        return reference.forward(logprob, bounds, formula, reference_logprob, length, tie)
    losses, sequence_logprob, _ = preference_loss_forward(
        logprob,
        bounds,
        reference_logprob,
        length,
        tie,
        int(kernel.link),
        kernel.per_token,
        kernel.numbers(),
        chosen,
    )
    coefficient = formula.nll_coefficient + kernel.nll_coefficient
    if coefficient:
        if length is None:
            length = bounds.diff()
        pairs = PairLogprobs.from_responses(sequence_logprob, reference_logprob, length, tie)
        losses = formula.with_nll(losses, pairs, coefficient)
    return losses, sequence_logprob


def _check_use(
    formula: PreferenceFormula, reference_logprob: Tensor | None, tie: Tensor | None
) -> None:
    if not isinstance(formula, PreferenceFormula):
        raise ValueError(
            "formula: expected one of fastalign.losses.formula, such as formula(dpo, beta=0.1), "
            f"got {formula!r}"
        )
    if formula.needs_reference and reference_logprob is None:
        raise ValueError("reference_logprob: expected one, for this loss needs it, got None")
    if not formula.needs_reference and reference_logprob is not None:
        raise ValueError(
            f"reference_logprob: expected None, for {formula.name} has no reference, got a tensor"
        )
    if not formula.uses_ties and tie is not None:
        raise ValueError(f"tie: expected None, for {formula.name} has no ties, got a tensor")


def _check_tensor(
    name: str, value: Tensor, shape: tuple[int, ...], kind: str, device: torch.device
) -> None:
    kinds = {torch.bool: "bool"}
    found = "floating" if value.is_floating_point() else kinds.get(value.dtype, "integer")
    if value.shape != shape or found != kind:
        raise ValueError(
            f"{name}: expected {kind} {tuple(shape)}, got {value.dtype} {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} as logprob is, got {value.device}")
