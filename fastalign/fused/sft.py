"""Drop-in for supervised fine-tuning.

Legend: T rows, V vocabulary, D hidden.
"""

import torch
from torch import Tensor

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
        loss = cross_entropy(logits.float(), targets, ignore_index=-100)

    Args:
        hidden: (T, D) hidden states that predict `targets` (already shifted).
        weight: (V, D) weight of the head, or a `LinearHead`.
        targets: (T,) token ids; rows with `ignore_index` are left out of every product, which
            synchronises with a GPU once, unless they are on the host.
        normaliser: divisor of the sum over tokens; None: the number of targets here.

    The keywords `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` are the fields of
    :class:`fastalign.LinearHead`; `temperature`, `ignore_index`, `compute_dtype`,
    `max_buffer_bytes` and `backend` are those of :func:`fastalign.linear_logprob`.

    Returns:
        The loss (), and the means of `metric_means`.

    Raises:
        ValueError: as `fused_linear_loss`.
    """
    head = as_linear_head(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    options = HeadOptions(temperature, ignore_index, compute_dtype, max_buffer_bytes, backend)
    rows = TargetRows(hidden, targets, options)
    loss_fn = sft_loss_fn(normaliser=rows.num_targets() if normaliser is None else normaliser)
    loss, sums = head_loss(rows.hidden, head, rows.targets, None, loss_fn, rows.options)
    return loss, metric_means(sums)
