"""A loss of the logits of a trained and of a frozen head, with its gradient in the forward.

For a loss that needs more of a row than its log-prob. Both heads' products are made a tile at a
time; autograd differentiates the loss by the logits of a strip of the tile, whose derivatives take
the products' place; the gradient's products are those of `fused_linear_loss`.

Legend: T rows, V and W vocabularies of the trained and the frozen head, C rows of a tile, n of a
strip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastalign.ops.head import tiled
from fastalign.ops.head.arguments import HeadOptions, check_call
from fastalign.ops.head.buffers import empty_rows
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.fused_linear_loss.chunk import check_scalar
from fastalign.ops.head.fused_linear_loss.chunked import LossWithGradient, SummedGradients
from fastalign.ops.head.head_tile.torch_strips import strip_rows
from fastalign.ops.head.linear_head import LinearHead
from fastalign.ops.head.products import accumulation_dtype

# Tensors of a tile's size: both heads' products, and the derivatives where they are narrower.
TENSORS_OF_TILE = 3
# Those of a strip's size that a divergence, its derivatives and the metrics hold at a time.
TENSORS_OF_STRIP = 16


@dataclass(frozen=True)
class LogitsStrip:
    """The rows row_start..row_stop of one call: n rows of a tile, none of them ignored.

    Logits are float32 (float64 for float64 products), behind scale and softcap; the trained head's
    require grad where gradients are wanted.
    """

    logits: Tensor  # (n, V)
    frozen_logits: Tensor  # (n, W)
    targets: Tensor  # (n,) int64
    row_start: int
    row_stop: int


LogitsLoss = Callable[[LogitsStrip], tuple[Tensor, dict[str, Tensor]]]


def two_heads_loss(
    hidden: Tensor,  # (T, D)
    head: LinearHead,  # of (V, D)
    frozen_hidden: Tensor,  # (T, E)
    frozen_head: LinearHead,  # of (W, E)
    targets: Tensor,  # (T,) int64
    loss_fn: LogitsLoss,
    options: HeadOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss () of two heads' logits, and its metrics, without their (T, V) tensors.

    Products (FLOPs over T * V * D): 6 for the trained head, 4 if its weight is frozen, 2 without
    gradients; 2 for the frozen head. The backward can run once.

    Args:
        hidden: (T, D) hidden states.
        head: the trained head.
        frozen_hidden: (T, E) hidden states of the same rows; get no gradient.
        frozen_head: the frozen head, which may have another number of tokens.
        targets: (T,) token ids, none of them ignored.
        loss_fn: function from a `LogitsStrip` to a scalar and metrics, called once for each strip;
            losses and metrics are summed over strips.
        options: options of the call, with temperature 1: `loss_fn` has its own.

    Returns:
        The summed loss, float32 (float64 where products are in float64), and the summed metrics.

    Raises:
        ValueError: if a shape, dtype, device or target is wrong, or the loss of `loss_fn` not a
            scalar.
    """
    assert isinstance(options.temperature, float)
    assert options.temperature == 1.0
    options = replace(options, backend="torch")  # no kernel reads these logits
    call = check_call("distillation", hidden, head, targets, options, num_heads=2)
    with torch.no_grad():
        frozen = check_call("distillation", frozen_hidden, frozen_head, targets, options)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, metrics, gradients = _TwoHeads(call, head, frozen, frozen_head, loss_fn).sweep()
    if gradients is None:
        return loss, metrics
    attached: Tensor = LossWithGradient.apply(loss, gradients, *call.leaves)  # type: ignore[no-untyped-call]
    return attached, metrics


def tile_bytes(num_rows: int, num_columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the bytes of a tile with its strips, of heads with at most so many columns.

    `dtype` is that of the logits.
    """
    strip = strip_rows(num_columns, num_rows, device_type)
    tensors = TENSORS_OF_TILE * num_rows + TENSORS_OF_STRIP * strip
    return tensors * num_columns * dtype.itemsize


def tile_rows(
    num_rows: int, num_columns: int, dtype: torch.dtype, device_type: str, budget: int
) -> int:
    """Return the most rows of a tile whose bytes are within the budget, at least one."""
    low, high = 1, max(num_rows, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if tile_bytes(middle, num_columns, dtype, device_type) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class _TwoHeads:
    """The two heads of a call, and its loss."""

    call: HeadCall
    head: LinearHead
    frozen: HeadCall
    frozen_head: LinearHead
    loss_fn: LogitsLoss

    def sweep(self) -> tuple[Tensor, dict[str, Tensor], SummedGradients | None]:
        """Return the loss (), metrics, and the gradients, if any are wanted."""
        call, device = self.call, self.call.hidden.device
        num_rows, dtype = call.hidden.shape[0], accumulation_dtype(call.compute_dtype)
        columns = [len(each.weight) for each in (self.head, self.frozen_head)]
        budget = call.max_buffer_bytes
        size = tile_rows(num_rows, max(columns), dtype, device.type, budget)
        inputs, others = call.inputs(), self.frozen.inputs()
        gradients = None
        if call.wanted.any:
            gradients = call.new_gradients(single=num_rows <= size)
        loss, metrics = torch.zeros((), dtype=dtype, device=device), dict[str, Tensor]()
        own, theirs = (empty_rows(min(size, num_rows), each, dtype, device) for each in columns)
        for start in range(0, num_rows, size):
            stop = min(start + size, num_rows)
            rows, tiles = inputs.rows(start, stop), (own[: stop - start], theirs[: stop - start])
            rows.project(tiles[0])
            others.rows(start, stop).project(tiles[1])
            loss += self._read(start, *tiles, gradients is not None, metrics)
            if gradients is not None:
                bracket = tiles[0]
                if bracket.dtype != inputs.hidden.dtype:  # the products' operands are narrower
                    bracket = empty_rows(stop - start, columns[0], inputs.hidden.dtype, device)
                    bracket.copy_(tiles[0])
                tiled.add_products(bracket, rows, gradients.rows(start, stop), None)
        return loss, metrics, None if gradients is None else SummedGradients(call, gradients)

    def _read(
        self,
        start: int,
        products: Tensor,  # (C, V)
        frozen_products: Tensor,  # (C, W)
        wanted: bool,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Return the loss () of a tile, whose products its derivatives by them replace.

        The tile's metrics are added to `metrics`; it begins at row `start`.
        """
        num_rows, num_columns = products.shape
        loss = torch.zeros((), dtype=products.dtype, device=products.device)
        step = strip_rows(num_columns, num_rows, products.device.type)
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            strip = products[rows].detach().requires_grad_(wanted)
            of_call = (start + rows.start, start + rows.stop)
            with torch.set_grad_enabled(wanted):
                part, found = self.loss_fn(
                    LogitsStrip(
                        self.head.transformed(strip),
                        self.frozen_head.transformed(frozen_products[rows]),
                        self.call.targets[slice(*of_call)],
                        *of_call,
                    )
                )
            check_scalar(part)
            loss += part.detach()
            for name, value in found.items():
                held = value.detach()
                metrics[name] = metrics[name] + held if name in metrics else held
            if wanted:
                (slope,) = torch.autograd.grad(part, strip)
                products[rows] = slope
        return loss
