"""Rows that have a target: without the others, prompts and padding cost no product."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.ops.head.arguments import HeadOptions


class TargetRows:
    """Rows of a head whose target is not ignored; the rows as they came where none is.

    Finding them waits for a GPU once; so under torch.compile every row stays, and an ignored one
    costs its products. Errors of shape are left to the operation that follows.

    Attributes:
        hidden: (N, D), differentiable.
        targets: (N,) int64.
        options: the call's options, with the gathered temperature (N,).
    """

    def __init__(self, hidden: Tensor, targets: Tensor, options: HeadOptions) -> None:
        self.hidden, self.targets, self.options = hidden, targets, options
        self._num_rows = hidden.shape[0] if hidden.ndim else 0
        self._mask: Tensor | None = None
        self._indices: Tensor | None = None
        if targets.ndim != 1 or hidden.shape[:1] != targets.shape:
            return
        if torch.compiler.is_compiling():
            return
        mask = targets != options.ignore_index
        indices = mask.nonzero().flatten()
        if indices.numel() == self._num_rows:
            return
        self._mask, self._indices = mask, indices
        self.hidden, self.targets = hidden.index_select(0, indices), targets[indices]
        temperature = options.temperature
        if isinstance(temperature, Tensor) and temperature.shape == targets.shape:
            self.options = replace(options, temperature=temperature[indices])

    def gathered(self, values: Tensor) -> Tensor:
        """Return the gathered rows of values (T, ...)."""
        return values if self._indices is None else values[self._indices]

    def num_targets(self) -> float | Tensor:
        """Return the number of targets, at least 1: on the host where the rows were gathered."""
        if torch.compiler.is_compiling():
            return (self.targets != self.options.ignore_index).sum().clamp(min=1)
        return float(max(self.targets.shape[0], 1))

    def bounds(self, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
        """Return row bounds of sequences, given among all rows, among the gathered ones.

        Raises:
            ValueError: if they do not rise from 0 to the number of rows.
        """
        # tensors and arrays alike, on the host
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
