"""Drop-in for supervised fine-tuning.

Legend: T rows, V vocabulary, D hidden.
"""

import torch
from torch import Tensor

from fastalign.fused.cross_entropy import CrossEntropy, head_cross_entropy
from fastalign.fused.metrics import metric_means
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.ops.head.arguments import HeadOptions, LinearBackend
from fastalign.ops.head.fused_linear_loss.api import head_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights, as_linear_head
from fastalign.ops.head.target_rows import TargetRows
from fastalign.ops.head.vocabulary_shard import VocabularyShard


def fused_linear_sft_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    targets: Tensor,  # (T,) int64
    *,
    label_smoothing: float = 0.0,
    z_coefficient: float = 0.0,
    class_weight: Tensor | None = None,  # (V,)
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
    """Compute the cross-entropy of a head, with its gradient in the forward.

    In place of these lines, and without their (T, V) tensors:

        logits = hidden @ weight.T
        loss = cross_entropy(
            logits.float(), targets, class_weight, ignore_index=-100, label_smoothing=...
        )
        loss = loss + z_coefficient * logits.logsumexp(-1).square().mean()

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` are left out of every product, which
            synchronises with a GPU once, unless they are on the host.
        label_smoothing: share of each target that is spread over the vocabulary, in [0, 1).
        z_coefficient: weight of the squared log-sum-exp of the logits (PaLM's z-loss: 1e-4).
        class_weight: (V,) weight of each token id; gets no gradient.
        normaliser: divisor of the sum over tokens; None: the number of targets here, or with
            class weights the sum of the targets', by which a z-loss is divided, too.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        The loss (), and the means of `metric_means`; with smoothing, weights or a z-loss also
        `cross_entropy`, the mean negative log-prob, and `z_loss`.

    Raises:
        ValueError: as `fused_linear_loss`; also if a number is out of its range, class weights are
            not (V,), the vocabulary is sharded beside one of these terms, or a softcap stands
            beside smoothing.
    """
    terms = CrossEntropy(label_smoothing, z_coefficient, class_weight)
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    if not terms.is_plain:
        if normaliser is None and class_weight is None:
            normaliser = rows.num_targets()
        found = head_cross_entropy(rows.hidden, head, rows.targets, rows.options, terms, normaliser)
        return found[0], metric_means(found[1])
    loss_fn = sft_loss_fn(normaliser=rows.num_targets() if normaliser is None else normaliser)
    loss, sums = head_loss(rows.hidden, head, rows.targets, None, loss_fn, rows.options)
    return loss, metric_means(sums)
