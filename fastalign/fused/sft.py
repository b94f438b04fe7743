"""The drop-in for supervised fine-tuning.

Legend: T rows, V vocabulary, D hidden.
"""

import torch
from torch import Tensor

from fastalign.fused.metrics import metric_means
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.ops.head.arguments import LinearBackend
from fastalign.ops.head.fused_linear_loss import fused_linear_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights
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
    """Cross-entropy of a head, with its gradient in the forward.

    In place of these lines, and without their (T, V) tensors:

        logits = hidden @ weight.T
        loss = cross_entropy(logits.float(), targets, ignore_index=-100)

    Args:
        hidden: Hidden states that predict `targets` (already shifted).
        weight: The head's weight, or the whole head: then without its fields as keywords.
        targets: Token ids; rows with `ignore_index` are left out of every product, for which a GPU
            is waited for once.
        normaliser: What the sum over tokens is divided by; None: the number of targets here.
        bias: This and what follows: as in `fused_linear_loss`.
        temperature: See there.
        softcap: See there.
        logit_scale: See there.
        ignore_index: See there.
        lora: See there.
        compute_dtype: See there.
        max_buffer_bytes: See there.
        backend: See there.
        vocabulary_shard: See there.

    Returns:
        The loss (), and the means of `metric_means`.

    Raises:
        ValueError: As `fused_linear_loss`.
    """
    rows = TargetRows(hidden, targets, temperature, ignore_index)
    if normaliser is None:
        normaliser = rows.num_targets()
    loss, sums = fused_linear_loss(
        rows.hidden,
        weight,
        rows.targets,
        None,
        sft_loss_fn(normaliser=normaliser),
        bias=bias,
        temperature=rows.temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        lora=lora,
        compute_dtype=compute_dtype,
        max_buffer_bytes=max_buffer_bytes,
        backend=backend,
        vocabulary_shard=vocabulary_shard,
    )
    return loss, metric_means(sums)
