"""A vocabulary head: the weight that turns hidden states into logits, and what belongs to it.

Legend: T rows, V vocabulary, D hidden, r rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.head.vocabulary_shard import VocabularyShard


@dataclass(frozen=True)
class LoraWeights:
    """LoRA's matrices (arXiv 2106.09685, section 4.1), named as in peft."""

    lora_A: Tensor  # (r, D)
    lora_B: Tensor  # (V, r)
    scaling: float = 1.0  # alpha / r

    def check(self, hidden: Tensor, weight: Tensor) -> None:
        """Check shapes and devices beside hidden (T, D) and weight (V, D).

        Raises:
            ValueError: if a matrix has another shape or device.
        """
        for name, value, dim, size in (
            ("lora_A", self.lora_A, 1, hidden.shape[1]),
            ("lora_B", self.lora_B, 0, weight.shape[0]),
        ):
            if value.ndim != 2 or value.shape[dim] != size:
                expected = f"(r, {size})" if dim else f"({size}, r)"
                raise ValueError(f"lora.{name}: expected {expected}, got {tuple(value.shape)}")
            if value.device != hidden.device:
                raise ValueError(
                    f"lora.{name}: expected on {hidden.device} as hidden is, got {value.device}"
                )
        if self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise ValueError(
                f"lora: expected one rank, got {self.lora_A.shape[0]} rows of lora_A and "
                f"{self.lora_B.shape[1]} columns of lora_B"
            )

    def hidden(self, hidden: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return scaling * hidden @ A^T, (T, r), in `compute_dtype`; differentiable."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(compute_dtype), self.lora_A.to(compute_dtype)) * self.scaling


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap(logit_scale * (hidden @ (weight + scaling * B @ A).T + bias)).

    Every operation on a head takes a `LinearHead` in place of its `weight` tensor. The keywords
    `bias`, `softcap`, `logit_scale`, `lora` and `vocabulary_shard` of those operations are this
    class's fields; each may be given in one of the two ways.

    Attributes:
        weight: (V, D) parameter; may be the (tied) embedding, or a slice of a larger tensor.
        bias: (V,) bias, or None.
        softcap: c of c * tanh(logits / c), as in Gemma 2 (arXiv 2408.00118), or None.
        logit_scale: positive factor of the logits: Cohere's multiplier, or one over Granite's
            divisor.
        lora: low-rank adapter of the weight, or None; weight + scaling * B @ A is never formed.
        shard: rows of the vocabulary that `weight`, `bias` and `lora_B` hold on this rank of a
            process group; None: all of them.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: LoraWeights | None = None
    shard: VocabularyShard | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden (..., D): for checks; training never forms them."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            low = F.linear(hidden.to(self.lora.lora_A.dtype), self.lora.lora_A)
            logits = logits + self.lora.scaling * F.linear(low, self.lora.lora_B)
        return self.transformed(logits)

    def transformed(self, products: Tensor) -> Tensor:
        """Return the logits (..., V) of products with the weight, bias and adapter added."""
        logits = products if self.logit_scale == 1.0 else self.logit_scale * products
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def mean_logit(self, hidden: Tensor) -> Tensor:
        """Return the mean over the vocabulary of each row's logits, (...), in float32.

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


def as_linear_head(
    weight: Tensor | LinearHead,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoraWeights | None = None,
    vocabulary_shard: VocabularyShard | None = None,
) -> LinearHead:
    """Return the head that one call of an operation describes.

    Raises:
        ValueError: if a keyword is given beside a `LinearHead` that already holds that field.
    """
    if not isinstance(weight, LinearHead):
        return LinearHead(weight, bias, softcap, logit_scale, lora, vocabulary_shard)
    head, fields = weight, {"bias": bias, "softcap": softcap, "lora": lora}
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if logit_scale != 1.0:
        given["logit_scale"] = logit_scale
    if vocabulary_shard is not None:
        given["shard"] = vocabulary_shard
    for name, value in given.items():
        held = getattr(head, name)
        if held is not None and not (name == "logit_scale" and held == 1.0):
            keyword = "vocabulary_shard" if name == "shard" else name
            raise ValueError(
                f"{keyword}: expected none beside a LinearHead that holds {name}={_shown(held)}, "
                f"got {_shown(value)}"
            )
    return replace(head, **given) if given else head


def _shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def lora_operands(
    lora: LoraWeights | None, hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a head multiplies beside hidden and weight: scaling * hidden @ A^T, and B.

    Raises:
        ValueError: if it is no `LoraWeights`, or a matrix has another shape or device.
    """
    if lora is None:
        return None, None
    if not isinstance(lora, LoraWeights):
        raise ValueError(f"lora: expected LoraWeights or None, got {type(lora).__name__}")
    lora.check(hidden, weight)
    return lora.hidden(hidden, compute_dtype), lora.lora_B
