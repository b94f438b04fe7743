"""The settings of a low-rank adapter: `--model.lora.rank` and its relatives."""

from dataclasses import dataclass, fields
from typing import Literal

BasePrecision = Literal["float32", "bf16", "nf4"]


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on a frozen base (LoRA, arXiv 2106.09685), in place of full training."""

    rank: int = 0
    """Rank of the adapter; 0: none, every weight is trained."""
    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Endings of layers' names; all-linear: every linear layer but the head (lm_head adds it)."""
    base: BasePrecision = "float32"
    """The frozen weights; bf16 needs bf16 compute, nf4 (QLoRA, arXiv 2305.14314) bitsandbytes."""
    save_merged: bool = True
    """Beside adapter/ (peft's layout) also write model/, the base with the adapter merged."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.lora.rank: expected at least 0, got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(
                f"model.lora.alpha: expected a finite number above 0, got {self.alpha}"
            )
        if not self.targets:
            raise ValueError("model.lora.targets: expected at least one name, got none")
        if self.rank > 0:
            return
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                raise ValueError(
                    f"model.lora.{field.name}: {value} is a setting of an adapter; expected "
                    "model.lora.rank above 0 with it, got 0"
                )
