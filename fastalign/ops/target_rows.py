"""Gathers the rows that have a target: prompts and padding then cost no product."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TargetRows:
    """Rows of a head whose target is not ignored; the rows as they came where none is.

    Finding them waits for a GPU once. Errors of shape are left to the operation that follows.

    Attributes:
        hidden: (N, D), differentiable.
        targets: (N,) int64.
        temperature: As given, or the gathered (N,).
    """

    def __init__(
        self, hidden: Tensor, targets: Tensor, temperature: float | Tensor, ignore_index: int
    ) -> None:
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self._num_rows = hidden.shape[0] if hidden.ndim else 0
        self._mask: Tensor | None = None
        self._kept: Tensor | None = None
        if targets.ndim != 1 or hidden.shape[:1] != targets.shape:
            return
        mask = targets != ignore_index
        kept = mask.nonzero().flatten()
        if kept.numel() == self._num_rows:
            return
        self._mask, self._kept = mask, kept
        self.hidden, self.targets = hidden.index_select(0, kept), targets[kept]
        if isinstance(temperature, Tensor) and temperature.shape == targets.shape:
            self.temperature = temperature[kept]

    def gathered(self, values: Tensor) -> Tensor:
        """Values (T, ...) of all rows, at the gathered ones."""
        return values if self._kept is None else values[self._kept]

    def bounds(self, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
        """Row bounds of sequences, given among all rows, among the gathered ones; on the host.

        Raises:
            ValueError: They do not rise from 0 to the number of rows.
        """
        bounds = torch.as_tensor(cu_seqlens).cpu()
        rising = bounds.ndim == 1 and bounds.numel() > 0 and not bounds.is_floating_point()
        if rising:
            ends = (int(bounds[0]), int(bounds[-1]))
            rising = ends == (0, self._num_rows) and not bool((bounds.diff() < 0).any())
        if not rising:
            raise ValueError(
                f"cu_seqlens: expected integers that rise from 0 to {self._num_rows} rows, "
                f"got {bounds.tolist()}"
            )
        if self._mask is not None:
            before = torch.nn.functional.pad(self._mask.long().cumsum(0), (1, 0)).cpu()
            bounds = before[bounds.long()]
        listed: list[int] = bounds.tolist()
        return listed
