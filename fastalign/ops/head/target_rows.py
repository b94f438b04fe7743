"""Rows that have a target: without the others, prompts and padding cost no product."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.ops.head.arguments import HeadOptions


class TargetRows:
    """Rows of a head whose target is not ignored; the rows as they came where none is.

    Finding them waits for a GPU where the targets are on it. It does not where they are still on
    the host, as a collator has them: rows, targets and bounds are found there, and sent. Under
    torch.compile every row stays, and an ignored one costs its products. Errors of shape are left
    to the operation that follows.

    Attributes:
        hidden: (N, D), differentiable.
        targets: (N,) int64, on the device of `hidden`.
        options: the call's options, with the gathered temperature (N,).
    """

    def __init__(self, hidden: Tensor, targets: Tensor, options: HeadOptions) -> None:
        self.hidden, self.targets, self.options = hidden, self._moved(targets, hidden), options
        self._num_rows = hidden.shape[0] if hidden.ndim else 0
        self._mask: Tensor | None = None
        self._indices: Tensor | None = None
        if targets.ndim != 1 or hidden.shape[:1] != targets.shape:
            return
        if torch.compiler.is_compiling():
            return
        mask = targets != options.ignore_index
        found = mask.nonzero().flatten()
        if found.numel() == self._num_rows:
            return
        self._mask, self._indices = mask, self._moved(found, hidden)
        self.targets = self._moved(targets[found], hidden)
        self.hidden = hidden.index_select(0, self._indices)
        temperature = options.temperature
        if isinstance(temperature, Tensor) and temperature.shape == targets.shape:
            self.options = replace(options, temperature=self.gathered(temperature))

    @staticmethod
    def _moved(values: Tensor, like: Tensor) -> Tensor:
        """Return values of the host on the device of `like`; others as they are."""
        return values.to(like.device, non_blocking=True) if values.device.type == "cpu" else values

    def gathered(self, values: Tensor) -> Tensor:
        """Return the gathered rows of values (T, ...), on the device of `hidden`."""
        moved = self._moved(values, self.hidden)
        return moved if self._indices is None else moved[self._indices]

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
