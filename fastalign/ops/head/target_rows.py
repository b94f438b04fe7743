"""Gathers the rows that have a target: prompts and padding then cost no product."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TargetRows:
    """Rows of a head whose target is not ignored; the rows as they came where none is.

    Finding them waits for a GPU once; so under torch.compile every row stays, and an ignored one
    costs its products. Errors of shape are left to the operation that follows.

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
        self._ignore_index = ignore_index
        if targets.ndim != 1 or hidden.shape[:1] != targets.shape:
            return
        if torch.compiler.is_compiling():
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

    def num_targets(self) -> float | Tensor:
        """How many targets there are, at least 1: a number where the rows were gathered."""
        if torch.compiler.is_compiling():
            return (self.targets != self._ignore_index).sum().clamp(min=1)
        return float(max(self.targets.shape[0], 1))

    def bounds(self, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
        """Row bounds of sequences, given among all rows, among the gathered ones; on the host.

        Raises:
            ValueError: They do not rise from 0 to the number of rows.
        """
        # tensors and arrays alike
        bounds = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else list(cu_seqlens)
        whole = isinstance(bounds, list) and all(isinstance(bound, int) for bound in bounds)
        if (
            not whole
            or [*bounds[:1], *bounds[-1:]] != [0, self._num_rows]
            or sorted(bounds) != bounds
        ):
            raise ValueError(
                f"cu_seqlens: expected integers that rise from 0 to {self._num_rows} rows, "
                f"got {bounds}"
            )
        if self._mask is not None:
            before = torch.nn.functional.pad(self._mask.long().cumsum(0), (1, 0)).cpu()
            bounds = before[torch.tensor(bounds)].tolist()
        return bounds
