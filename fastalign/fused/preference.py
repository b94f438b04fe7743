"""Drop-ins for preference pairs.

Legend: T rows, V vocabulary, D hidden, R = 2B responses of B pairs: chosen, rejected, chosen, ...
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.fused.metrics import metric_means
from fastalign.losses import dpo, formula
from fastalign.losses.chunk_losses import PairLoss, preference_loss_fn
from fastalign.losses.formulas import check_pair_loss
from fastalign.ops.head.arguments import HeadOptions, LinearBackend
from fastalign.ops.head.fused_linear_loss.api import head_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.target_rows import TargetRows
from fastalign.ops.head.vocabulary_shard import VocabularyShard


def fused_linear_preference_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor | Sequence[int],  # (2B + 1,)
    pair_loss: PairLoss,
    reference_logprob: Tensor | None = None,  # (2B,)
    *,
    normaliser: float | Tensor | None = None,
    tie: Tensor | None = None,  # (B,) bool
    margin: Tensor | None = None,  # (B,)
    beta: float = 0.1,
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
    """Compute any preference loss of a head, with its gradient in the forward.

    In place of these lines, and without their (T, V) tensors:

        logprob = log_softmax((hidden @ weight.T).float(), -1)[arange(T), targets]
        sums = stack([part.sum() for part in logprob.split(lengths)])
        loss = pair_loss(PairLogprobs.from_responses(sums, reference_logprob, ...)).mean()

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` (prompts, padding) are left out of every
            product, which synchronises with a GPU once, unless they are on the host.
        cu_seqlens: (2B + 1,) row bounds of the sequences: chosen, rejected, chosen, ...
        pair_loss: formula, for example `formula(ipo_sum, beta=0.1)` of `fastalign.losses`; or
            any function from `PairLogprobs` of B pairs to losses (B,).
        reference_logprob: (2B,) reference model's log-prob of each sequence; None for losses
            without a reference.
        normaliser: divisor of the sum over pairs; None: the number of pairs here.
        tie: (B,) bool, True for ties. A loss without a form for ties treats them as any other
            pair; the accuracies leave them out.
        margin: (B,) margins, passed to a function `pair_loss`; no formula uses them.
        beta: scale of the rewards in the metrics.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        The loss (), and the means of `metric_means`.

    Raises:
        ValueError: as `fused_linear_loss`; also if lengths do not fit each other, or `pair_loss`
            is a bare function of log-probs.
    """
    check_pair_loss(pair_loss)
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    bounds = rows.bounds(cu_seqlens)
    if normaliser is None:
        normaliser = float(max((len(bounds) - 1) // 2, 1))
    loss_fn = preference_loss_fn(
        pair_loss,
        bounds,
        reference_logprob,
        normaliser=normaliser,
        tie=tie,
        margin=margin,
        beta=beta,
    )
    loss, sums = head_loss(rows.hidden, head, rows.targets, bounds[::2], loss_fn, rows.options)
    return loss, metric_means(sums)


def fused_linear_dpo_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor | Sequence[int],  # (2B + 1,)
    reference_logprob: Tensor,  # (2B,)
    *,
    beta: float = 0.1,
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
    """Compute DPO (arXiv 2305.18290, eq. 7): `fused_linear_preference_loss` with `losses.dpo`.

    In place of these lines, and without their (T, V) tensors:

        logprob = log_softmax((hidden @ weight.T).float(), -1)[arange(T), targets]
        ratio = stack([part.sum() for part in logprob.split(lengths)]) - reference_logprob
        loss = -logsigmoid(beta * (ratio[0::2] - ratio[1::2])).mean()

    The arguments are those of `fused_linear_preference_loss`; `beta` is the loss's.

    Returns:
        The mean loss (), and the means of `metric_means`.

    Raises:
        ValueError: as `fused_linear_preference_loss`.
    """
    return fused_linear_preference_loss(
        hidden,
        as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard),
        targets,
        cu_seqlens,
        formula(dpo, beta=beta),
        reference_logprob,
        normaliser=normaliser,
        beta=beta,
        temperature=temperature,
        ignore_index=ignore_index,
        compute_dtype=compute_dtype,
        max_buffer_bytes=max_buffer_bytes,
        backend=backend,
    )
