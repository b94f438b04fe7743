"""Choices that settings name and computations take; commands know them without torch."""

from typing import Literal

AttentionChoice = Literal["auto", "sdpa", "flash_attn", "varlen", "flex"]
Packing = Literal["shared_prefix", "packed", "padded"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PackingChoice = Literal["auto", "shared_prefix", "packed", "padded"]
