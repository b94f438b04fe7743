"""A causal model's head, as the numbers that `linear_logprob` and `fused_linear_loss` take."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How each configuration names a factor of its logits, and whether it multiplies or divides.
LOGIT_SCALES = {"logit_scale": False, "lm_head_multiplier": False, "logits_scaling": True}


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: (V, D), the parameter itself (tied or not).
        bias: (V,) or None.
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V): the definition, for checks; training never forms it."""
        logits = self.logit_scale * torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def lm_head(model: Any) -> Head:
    """Reads the head of a transformers causal model.

    Raises:
        ValueError: the model has no output embeddings.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"{type(model).__name__} has no language-model head")
    scale = 1.0
    for name, divides in LOGIT_SCALES.items():
        value = getattr(model.config, name, None)
        if value is not None:
            scale = scale / value if divides else scale * value
    return Head(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        logit_scale=float(scale),
    )


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compares the head's own logits with the model's on two tokens.

    Raises:
        ValueError: the model does something to its logits that `Head` does not know.
    """
    input_ids = torch.tensor([[0, 1]], device=model.device)
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
    ours, theirs = lm_head(model).logits(hidden).float(), model(input_ids).logits.float()
    scale = theirs.abs().max().clamp(min=1e-6)
    error = float((ours - theirs).abs().max() / scale)
    if not error < 2e-2:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits in a way that fastalign does not "
            f"know (relative difference {error:.1e}); it cannot be trained exactly"
        )
