"""A low-rank adapter on a head's weight: W + scaling * B A, which is never formed.

Legend: T rows, V vocabulary, D hidden, r rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LoraWeights:
    """LoRA's matrices (arXiv 2106.09685, section 4.1), named as in peft."""

    lora_A: Tensor  # (r, D)
    lora_B: Tensor  # (V, r)
    scaling: float = 1.0  # alpha / r

    def check(self, hidden: Tensor, weight: Tensor) -> None:
        """Checks shapes and devices beside hidden (T, D) and weight (V, D).

        Raises:
            ValueError: Naming the matrix, what was expected and what came.
        """
        for name, value, place, size in (
            ("lora_A", self.lora_A, 1, hidden.shape[1]),
            ("lora_B", self.lora_B, 0, weight.shape[0]),
        ):
            if value.ndim != 2 or value.shape[place] != size:
                expected = f"(r, {size})" if place else f"({size}, r)"
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
        """The product scaling * hidden A^T, (T, r), in `compute_dtype`; differentiable."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(compute_dtype), self.lora_A.to(compute_dtype)) * self.scaling


def lora_operands(
    lora: LoraWeights | None, hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What a head multiplies beside hidden and weight: scaling * hidden A^T (T, r) and B (V, r).

    Raises:
        ValueError: Not LoraWeights, or a matrix of another shape or device.
    """
    if lora is None:
        return None, None
    if not isinstance(lora, LoraWeights):
        raise ValueError(f"lora: expected LoraWeights or None, got {type(lora).__name__}")
    lora.check(hidden, weight)
    return lora.hidden(hidden, compute_dtype), lora.lora_B
