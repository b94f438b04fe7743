"""Drop-in for responses that were found good or bad.

Legend: T rows, V vocabulary, D hidden, B responses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.fused.metrics import metric_means
from fastalign.losses.chunk_losses import kto_loss_fn
from fastalign.ops.head.arguments import HeadOptions, LinearBackend
from fastalign.ops.head.fused_linear_loss.api import head_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.target_rows import TargetRows
from fastalign.ops.head.vocabulary_shard import VocabularyShard


def fused_linear_kto_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor | Sequence[int],  # (B + 1,)
    reference_logprob: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl: float | Tensor,  # or ()
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
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
    """Compute KTO's loss (arXiv 2402.01306, eq. 7 and 8) of a head, with its gradient.

    In place of these lines, and without their (T, V) tensors:

        logprob = log_softmax((hidden @ weight.T).float(), -1)[arange(T), targets]
        ratio = stack([part.sum() for part in logprob.split(lengths)]) - reference_logprob
        gain = beta * (ratio - kl)
        loss = where(desirable, sigmoid(-gain), sigmoid(gain)).mean()

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` (prompts, padding) are left out of every
            product, which synchronises with a GPU once, unless they are on the host.
        cu_seqlens: (B + 1,) row bounds of the sequences.
        reference_logprob: (B,) reference model's log-prob of each sequence.
        desirable: (B,) True for the sequences that were found good.
        kl: estimate of the KL to the reference: `losses.kto_kl` of responses to other prompts.
        beta: strength of the pull towards the reference.
        desirable_weight: weight of the good sequences' losses.
        undesirable_weight: weight of the bad ones'.
        normaliser: divisor of the sum over sequences; None: the number of sequences here.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        The loss (), and the means of `metric_means`.

    Raises:
        ValueError: as `fused_linear_loss`; also if lengths do not fit each other, or a weight is
            not above 0.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    bounds = rows.bounds(cu_seqlens)
    loss_fn = kto_loss_fn(
        bounds,
        reference_logprob,
        desirable,
        kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        normaliser=float(max(len(bounds) - 1, 1)) if normaliser is None else normaliser,
    )
    loss, sums = head_loss(rows.hidden, head, rows.targets, bounds, loss_fn, rows.options)
    return loss, metric_means(sums)
