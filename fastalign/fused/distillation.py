"""Distillation: a head's divergence from a teacher's, beside the cross-entropy of the targets.

The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649, section 2)
over the tokens of given responses.

Legend: N rows, V vocabulary, D and E hidden sizes, n rows of a strip.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.fused.cross_entropy import CrossEntropy, class_weights
from fastalign.losses.supervised import cross_entropy, z_loss
from fastalign.ops.head.arguments import HeadOptions, resolve_compute_dtype
from fastalign.ops.head.fused_linear_loss.two_heads import LogitsStrip, two_heads_loss
from fastalign.ops.head.linear_head import LinearHead
from fastalign.ops.head.linear_jsd import generalised_jsd
from fastalign.ops.head.products import accumulation_dtype


@dataclass(frozen=True)
class Divergence:
    """A divergence from a teacher, and its share of the loss.

    Attributes:
        weight: share of the divergence; the cross-entropy has the rest.
        beta: as in `generalised_jsd`.
        temperature: divisor of both logits in the divergence.
    """

    weight: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class TeacherRows:
    """A frozen teacher's side of the rows.

    Attributes:
        hidden: (N, E) hidden states.
        head: head of these, of the same tokens; rows beyond the other head's are left out.
    """

    hidden: Tensor
    head: LinearHead


@dataclass(frozen=True)
class Divisors:
    """Divisors of the sums over tokens.

    Attributes:
        divergence: tokens of the *whole* step.
        cross_entropy: the same, or with class weights the sum of these tokens' weights.
    """

    divergence: float
    cross_entropy: float


def head_distillation(
    hidden: Tensor,  # (N, D)
    head: LinearHead,
    teacher: TeacherRows,
    targets: Tensor,  # (N,) int64
    options: HeadOptions,
    terms: CrossEntropy,
    divergence: Divergence,
    divisors: Divisors,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return weight * JSD + (1 - weight) * cross-entropy, (), and metrics' sums.

    The metrics are those of `head_cross_entropy`, and `jsd`, the divergence: sums over tokens.
    Where the heads differ in their numbers of rows, those that only one has are no tokens: the
    divergence is that of the softmaxes over the others.

    Raises:
        ValueError: as `two_heads_loss`; also if the vocabulary is sharded, or the class weights are
            not (V,).
    """
    num_common = min(len(head.weight), len(teacher.head.weight))
    dtype = resolve_compute_dtype(hidden, head.weight, options.compute_dtype)
    wide = hidden.new_empty(0, dtype=accumulation_dtype(dtype))
    target_weight, mean_weight = class_weights(terms, head, targets, options, wide)
    share, temperature = divergence.weight, divergence.temperature

    def loss_fn(strip: LogitsStrip) -> tuple[Tensor, dict[str, Tensor]]:
        both = (strip.logits[:, :num_common], strip.frozen_logits[:, :num_common])
        if temperature != 1.0:
            both = (both[0] / temperature, both[1] / temperature)
        log_p, log_q = (logits.log_softmax(-1) for logits in both)
        jsd = generalised_jsd(log_p, log_q, beta=divergence.beta).sum()
        loss, metrics = share * jsd / divisors.divergence, {"jsd": jsd}
        with nullcontext() if share < 1 else torch.no_grad():
            losses, more = _cross_entropies(strip, terms, target_weight, mean_weight)
        if share < 1:
            loss = loss + (1 - share) * losses.sum() / divisors.cross_entropy
        return loss, {**metrics, **more}

    return two_heads_loss(hidden, head, teacher.hidden, teacher.head, targets, loss_fn, options)


def _cross_entropies(
    strip: LogitsStrip, terms: CrossEntropy, target_weight: Tensor | None, mean_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cross-entropy (n,) of a strip's targets with its terms, and metrics' sums."""
    logits, rows = strip.logits, slice(strip.row_start, strip.row_stop)
    logsumexp = logits.logsumexp(-1)
    at_target = logits.gather(1, strip.targets[:, None])[:, 0]
    logprob = at_target - logsumexp
    mean_logit = torch.zeros_like(logsumexp)
    if terms.label_smoothing:
        weighted = logits if terms.class_weight is None else logits * terms.class_weight.to(logits)
        mean_logit = weighted.mean(-1)
    losses = cross_entropy(
        logprob,
        logsumexp,
        mean_logit,
        label_smoothing=terms.label_smoothing,
        target_weight=None if target_weight is None else target_weight[rows],
        mean_weight=mean_weight,
    )
    metrics = {"cross_entropy": -logprob.sum()}
    if terms.z_coefficient:
        squares = z_loss(logsumexp)
        losses = losses + terms.z_coefficient * squares
        metrics["z_loss"] = squares.sum()
    with torch.no_grad():
        expected = (logits.softmax(-1) * logits).sum(-1)
        metrics["entropy"] = (logsumexp - expected).sum()
        metrics["mean_token_accuracy"] = (at_target >= logits.amax(-1)).to(logits.dtype).sum()
        metrics["num_target_tokens"] = torch.full((), len(logits), device=logits.device)
    return losses, metrics
