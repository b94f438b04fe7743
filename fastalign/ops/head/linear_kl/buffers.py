"""The buffers of `linear_kl`: those of a head with twice the vocabulary, seen as two.

Legend: V vocabulary, K kept rows.
"""

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers, Plan, plan_buffers


def plan_pair(
    num_rows: int,
    num_columns: int,
    compute_dtype: torch.dtype,
    device_type: str,
    max_buffer_bytes: int,
    *,
    trained: bool,
    backend: str,
) -> Plan:
    """Divides the budget between two working tiles and the kept brackets, two for each row.

    Raises:
        ValueError: The budget does not hold a row of each head.
    """
    return plan_buffers(
        num_rows,
        2 * num_columns,
        compute_dtype,
        device_type,
        max_buffer_bytes,
        scratch=backend == "torch",
        keep=trained,
        convert=trained,
        # kept brackets are combined in it, and rows may have to be read again
        tile=True,
    )


class PairBuffers:
    """The scratch memory of one call; every buffer is (2, rows, V)."""

    def __init__(
        self,
        plan: Plan,
        num_columns: int,
        compute_dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ) -> None:
        self._buffers = Buffers(plan, 2 * num_columns, compute_dtype, device, backend)
        self._columns = num_columns
        self.backend = backend
        self.tile_rows = self._buffers.tile_rows
        self.projects_in_place = self._buffers.projects_in_place
        scratch = self._buffers.scratch
        self.scratch = None if scratch is None else scratch.view(4, -1, num_columns)

    def _as_pair(self, buffer: Tensor) -> Tensor:
        return buffer.view(2, buffer.shape[0], self._columns)

    def new_kept(self, rows: int) -> Tensor:
        """A place (2, rows, V) for brackets, in the products' dtype."""
        return self._as_pair(self._buffers.new_kept(rows))

    def tiles(self, rows: int) -> Tensor:
        """The working tiles (2, rows, V), in the accumulation dtype."""
        return self._as_pair(self._buffers.tile(rows))

    def converted(self, rows: int) -> Tensor:
        """A place (2, rows, V) in the products' dtype: the tiles themselves where dtypes agree."""
        return self._as_pair(self._buffers.converted(rows))
