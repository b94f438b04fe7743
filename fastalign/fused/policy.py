"""Drop-in for policy gradients, and log-probs of whole sequences.

Legend: T rows, V vocabulary, D hidden, R sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.fused.metrics import metric_means
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.losses.policy import MAX_LOG_RATIO
from fastalign.ops.head.arguments import HeadOptions, LinearBackend
from fastalign.ops.head.fused_linear_loss.api import head_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.linear_logprob.api import head_logprob
from fastalign.ops.head.target_rows import TargetRows
from fastalign.ops.head.vocabulary_shard import VocabularyShard
from fastalign.ops.segments import segment_sum


def fused_linear_ppo_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
    entropy_coefficient: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
    normaliser: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraWeights | None = None,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
    backend: LinearBackend = "auto",
    vocabulary_shard: VocabularyShard | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped policy loss (arXiv 1707.06347, eq. 7), with its gradient.

    In place of these lines, and without their (T, V) tensors:

        log_p = log_softmax((hidden @ weight.T).float() / temperature, -1)
        log_ratio = log_p[arange(T), targets] - old_logprob
        ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = -minimum(ratio * advantage, clipped * advantage).mean()
        loss = loss - entropy_coefficient * -(log_p.exp() * log_p).sum(-1).mean()

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) sampled token ids; rows with `ignore_index` are left out of every product,
            which synchronises with a GPU once, unless they are on the host.
        old_logprob: (T,) log-probs of the policy that sampled, at the same temperature; get no
            gradient.
        advantage: (T,) advantages; get no gradient.
        clip_range: epsilon of the clipping.
        entropy_coefficient: weight of the entropy bonus. Where it is not 0 the logits are
            computed twice, 8 TDV in place of 6.
        max_log_ratio: bound of the log-ratio, as in verl; a token beyond it gets no gradient.
        normaliser: divisor of the sum over tokens; None: the number of targets here.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        The loss (), and the means of `metric_means`: `policy/approxkl_avg` (half the mean squared
        difference of log-probs), `policy/clipfrac_avg`, `policy/entropy_avg`, `val/ratio`; and the
        number of tokens beyond `max_log_ratio`, `policy/num_clamped`.

    Raises:
        ValueError: as `fused_linear_loss`; also if a shape, device or the clip range is wrong.
    """
    for name, value in (("old_logprob", old_logprob), ("advantage", advantage)):
        if value.shape != targets.shape:
            raise ValueError(f"{name}: expected {tuple(targets.shape)}, got {tuple(value.shape)}")
        if value.device not in (targets.device, hidden.device):
            raise ValueError(
                f"{name}: expected on {targets.device} as targets are, got {value.device}"
            )
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    loss_fn = ppo_loss_fn(
        rows.gathered(old_logprob),
        rows.gathered(advantage),
        clip_range=clip_range,
        entropy_coefficient=entropy_coefficient,
        max_log_ratio=max_log_ratio,
        normaliser=rows.num_targets() if normaliser is None else normaliser,
    )
    loss, sums = head_loss(rows.hidden, head, rows.targets, None, loss_fn, rows.options)
    return loss, metric_means(sums)


def sequence_logprob(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor | Sequence[int],  # (R + 1,)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraWeights | None = None,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
    backend: LinearBackend = "auto",
    vocabulary_shard: VocabularyShard | None = None,
) -> Tensor:
    """Compute the log-probs (R,) of sequences: `linear_logprob`, summed over each.

    In place of these lines, and without their (T, V) tensors:

        logprob = log_softmax((hidden @ weight.T).float(), -1)[arange(T), targets]
        return stack([part.sum() for part in logprob.split(lengths)])

    Differentiable in hidden, weight and bias. Sums are accumulated in float64.

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` are left out of every product, which
            synchronises with a GPU once, unless they are on the host.
        cu_seqlens: (R + 1,) row bounds of the sequences, from 0 to T.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        (R,) float32 (float64 where products are in float64); 0 for an empty sequence.

    Raises:
        ValueError: as `linear_logprob`; also if bounds do not rise from 0 to T.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    bounds = torch.tensor(rows.bounds(cu_seqlens)).to(hidden.device, non_blocking=True)
    logprob, _ = head_logprob(rows.hidden, head, rows.targets, rows.options)
    return segment_sum(logprob, bounds)
