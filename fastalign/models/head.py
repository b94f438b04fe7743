"""A causal model's head, as the numbers that `linear_logprob` and `fused_linear_loss` take."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.models.lora import layer_adapter
from fastalign.ops import LoraWeights

# How each configuration names a factor of its logits, and whether it multiplies or divides.
LOGIT_SCALES = {"logit_scale": False, "lm_head_multiplier": False, "logits_scaling": True}


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden @ (weight + scaling * B @ A).T + bias)).

    Attributes:
        weight: (V, D), the parameter itself (tied or not).
        bias: (V,) or None.
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: factor of the logits.
        lora: an adapter on the weight, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: LoraWeights | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V): the definition, for checks; training never forms it."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            low = F.linear(hidden.to(self.lora.lora_A.dtype), self.lora.lora_A)
            logits = logits + self.lora.scaling * F.linear(low, self.lora.lora_B)
        logits = self.logit_scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def mean_logit(self, hidden: Tensor) -> Tensor:
        """(..., D) to (...): the mean over the vocabulary of each row's logits, in float32.

        It is the product with the mean row of the weight, so no logits are formed; a softcap
        forbids that.
        """
        assert self.softcap is None
        wide = hidden.float()
        mean = wide @ self.weight.mean(0, dtype=torch.float32)
        if self.bias is not None:
            mean = mean + self.bias.float().mean()
        if self.lora is not None:
            low = F.linear(wide, self.lora.lora_A.float())
            mean = mean + self.lora.scaling * (low @ self.lora.lora_B.float().mean(0))
        return self.logit_scale * mean


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
        lora=layer_adapter(embeddings),
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
