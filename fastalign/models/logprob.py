"""Log-probs of a batch's responses under a model."""

from typing import Any

import torch
from torch import Tensor

from fastalign.batch import PackedBatch
from fastalign.models.head import lm_head
from fastalign.models.packed import Packing, predict_hidden
from fastalign.ops import linear_logprob


def response_logprob(
    model: Any,
    batch: PackedBatch,
    *,
    packing: Packing,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """Log-prob of every trained token.

    Args:
        model: a causal model from `load_policy`.
        batch: on the model's device.
        packing: see `predict_hidden`.
        temperature: divides the logits.
        compute_dtype: dtype of the matrix products; None: the hidden states'.
        max_buffer_bytes: most bytes of logits at a time; None: the operation's default.

    Returns:
        (N,) float32 (float64 for a float64 model).
    """
    hidden = predict_hidden(model, batch, packing=packing)
    head = lm_head(model)
    logprob = linear_logprob(
        hidden,
        head.weight,
        batch.targets,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        lora=head.lora,
        compute_dtype=compute_dtype,
        max_buffer_bytes=max_buffer_bytes,
    )
    assert isinstance(logprob, Tensor)
    return logprob
