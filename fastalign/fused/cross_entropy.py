"""The cross-entropy of a head with label smoothing, class weights and a z-loss.

Each is a function of the target's log-prob and of one or two logits a row. The head's operation
differentiates the log-prob; the logits are products of rows, which autograd differentiates.

Legend: N rows, V vocabulary, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.chunk_losses import token_metrics
from fastalign.losses.supervised import check_share, cross_entropy, z_loss
from fastalign.ops.head.arguments import HeadOptions
from fastalign.ops.head.fused_linear_loss import TokenChunk
from fastalign.ops.head.fused_linear_loss.api import head_loss
from fastalign.ops.head.linear_head import LinearHead
from fastalign.ops.head.logsumexp import target_logits, weighted_mean_logits


@dataclass(frozen=True)
class CrossEntropy:
    """The terms of a cross-entropy beside the log-prob.

    Attributes:
        label_smoothing: share of each target that is spread over the vocabulary.
        z_coefficient: weight of the squared log-sum-exp.
        class_weight: (V,) weight of each token id, or None.
    """

    label_smoothing: float = 0.0
    z_coefficient: float = 0.0
    class_weight: Tensor | None = None

    def __post_init__(self) -> None:
        check_share(self.label_smoothing)
        if not 0.0 <= self.z_coefficient < float("inf"):
            raise ValueError(
                f"z_coefficient: expected a finite number not below 0, got {self.z_coefficient}"
            )

    @property
    def is_plain(self) -> bool:
        """True if it is the negative log-prob."""
        return not self.label_smoothing and not self.z_coefficient and self.class_weight is None


def head_cross_entropy(
    hidden: Tensor,  # (N, D)
    head: LinearHead,
    targets: Tensor,  # (N,) int64
    options: HeadOptions,
    terms: CrossEntropy,
    normaliser: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () over `normaliser` (None: the class weights' sum), and metrics' sums.

    The metrics are those of `sft_loss_fn`, `cross_entropy` (the negative log-prob) and, with a
    coefficient, `z_loss`, the squared log-sum-exp; sums over target tokens.

    Raises:
        ValueError: as `fused_linear_loss`; also if the vocabulary is sharded, the head has a
            softcap beside smoothing, or the class weights are not (V,).
    """
    logit = target_logits(hidden, head, targets, options)
    target_weight, mean_weight = class_weights(terms, head, targets, options, logit)
    mean = torch.zeros_like(logit)
    if terms.label_smoothing:
        mean = weighted_mean_logits(hidden, head, terms.class_weight, options)
    if normaliser is None:
        assert target_weight is not None
        normaliser = target_weight.double().sum().to(logit)
    parts: list[tuple[slice, list[Tensor]]] = []

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        rows = slice(chunk.row_start, chunk.row_stop)
        # Leaves, so that a chunk's loss has derivatives by the two logits, too.
        own = [each.detach()[rows].requires_grad_() for each in (logit, mean)]
        logsumexp = torch.where(chunk.is_target, own[0] - chunk.logprob, 0.0)
        losses = cross_entropy(
            chunk.logprob,
            logsumexp,
            own[1],
            label_smoothing=terms.label_smoothing,
            target_weight=None if target_weight is None else target_weight[rows],
            mean_weight=mean_weight,
        )
        squares = z_loss(logsumexp)
        losses = losses + terms.z_coefficient * squares
        loss = losses.masked_fill(~chunk.is_target, 0.0).sum() / normaliser
        if loss.requires_grad:
            found = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            slopes = [own[0] * 0 if slope is None else slope for slope in found]
            parts.append((rows, slopes))
        metrics = {**token_metrics(chunk), "cross_entropy": -chunk.logprob.sum()}
        if terms.z_coefficient:
            metrics["z_loss"] = squares.sum()
        return loss, metrics

    loss, sums = head_loss(hidden, head, targets, None, loss_fn, options)
    for rows, slopes in parts:
        for value, slope in zip((logit, mean), slopes, strict=True):
            if value.requires_grad:  # a term of value 0, whose gradient is the slope's
                part = value[rows]
                loss = loss + (slope.detach() * (part - part.detach())).sum()
    return loss, sums


def class_weights(
    terms: CrossEntropy, head: LinearHead, targets: Tensor, options: HeadOptions, like: Tensor
) -> tuple[Tensor | None, float]:
    """Return the weight of each target (N,), 0 if it is ignored, or None; and the mean weight.

    Raises:
        ValueError: if there is not one weight for each token id.
    """
    weights = terms.class_weight
    if weights is None:
        return None, 1.0
    if weights.shape != head.weight.shape[:1]:
        raise ValueError(
            f"class_weight: expected ({len(head.weight)},), one for each token id, got "
            f"{tuple(weights.shape)}"
        )
    ignored, weights = targets == options.ignore_index, weights.detach().to(like)
    of_targets = weights[targets.masked_fill(ignored, 0)].masked_fill(ignored, 0.0)
    return of_targets, weights.double().mean().item()
