"""A head's forward without logits: each block of its product leaves statistics alone, in Triton."""

from fastalign.ops.backends import on_device
from fastalign.ops.head.head_tile import RowStatistics
from fastalign.ops.head.operands import HeadInputs
from fastalign.ops.registration import kernels


def read_products(head: HeadInputs, with_entropy: bool) -> RowStatistics:
    """Return the statistics of every row; entropies are zeros where not wanted."""
    with on_device(head.hidden):
        found: RowStatistics = kernels("head.head_product", "triton").read(head, with_entropy)
    return found
