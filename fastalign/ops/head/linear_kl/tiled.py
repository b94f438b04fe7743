"""Two heads in tiles: statistics forward, products backward, with a bounded number of logits.

Legend: N rows, V vocabulary, D and E hidden, n tile rows, K rows whose brackets are saved.
Products, in units of N * D * V FLOPs where D = E: forward 4, and 4 more for rows of a frozen head
that are not saved; backward 4 (2 for a frozen head) for saved rows, 8 for the others (0 for a
frozen head's).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.kl_tile import PairStatistics, PairUpstream, read_pair
from fastalign.ops.head.operands import Gradients, HeadInputs
from fastalign.ops.head.products import accumulation_dtype, product
from fastalign.ops.head.tiled import add_products, scaled_rows, tile_spans


@dataclass(frozen=True)
class PairInputs:
    """The operands of both heads: the same targets, ignored rows and transform."""

    policy: HeadInputs
    reference: HeadInputs
    over_reference: bool

    def rows(self, start: int, stop: int) -> "PairInputs":
        """Return the same heads on rows start..stop."""
        policy, reference = self.policy.rows(start, stop), self.reference.rows(start, stop)
        return PairInputs(policy, reference, self.over_reference)

    def project(self, products: Tensor) -> None:
        """Write both heads' products into (2, n, V)."""
        for head, out in zip((self.policy, self.reference), products, strict=True):
            head.project(out)

    def read(
        self,
        products: Tensor,
        buffers: "PairBuffers",
        *,
        brackets: Tensor | None = None,
        gradient: Tensor | None = None,
        upstream: PairUpstream | None = None,
    ) -> PairStatistics:
        """Read products (2, n, V) in one pass: see `kl_tile.read_pair`."""
        return read_pair(
            self.policy.tile(products),
            self.over_reference,
            buffers.backend,
            buffers.scratch,
            brackets=brackets,
            gradient=gradient,
            upstream=upstream,
        )


class PairBuffers:
    """Buffers of a head with twice the padded vocabulary, as two: each is (2, rows, V)."""

    def __init__(self, buffers: Buffers, num_columns: int) -> None:
        self._buffers, self._columns = buffers, num_columns
        self.backend, self.tile_rows = buffers.backend, buffers.tile_rows
        self.projects_in_place = buffers.projects_in_place
        scratch = buffers.scratch
        if scratch is not None:
            rows, stride = scratch.shape[1], scratch.shape[2] // 2
            scratch = scratch.view(4, rows, stride)[..., :num_columns]
        self.scratch = scratch

    def _as_pair(self, buffer: Tensor) -> Tensor:
        stride = buffer.shape[1] // 2
        return buffer.view(2, buffer.shape[0], stride)[..., : self._columns]

    def new_brackets(self) -> Tensor:
        """Return an empty (2, K, V) for the brackets that the plan saves."""
        return self._as_pair(self._buffers.new_brackets())

    def tiles(self, rows: int) -> Tensor:
        """Return the working tiles (2, rows, V), in the accumulation dtype."""
        return self._as_pair(self._buffers.tile(rows))

    def converted(self, rows: int) -> Tensor:
        """Return (2, rows, V) in the products' dtype: the tiles themselves where dtypes agree."""
        return self._as_pair(self._buffers.converted(rows))


@dataclass(frozen=True)
class SavedPair:
    """Results of a forward that its backward needs.

    Attributes:
        brackets: (2, K, V) both brackets of the first K rows, in the products' dtype.
        jacobians: (2, N - K, D) both brackets @ W of the other rows, in the accumulation dtype,
            where only hidden states are trained; else None.
    """

    brackets: Tensor
    jacobians: Tensor | None


def forward(pair: PairInputs, buffers: PairBuffers, saved: SavedPair) -> PairStatistics:
    """Read every row's statistics; write what the backward needs into `saved`."""
    num_rows, num_saved = pair.policy.hidden.shape[0], saved.brackets.shape[1]
    parts = []
    for start, stop in tile_spans(num_rows, num_saved, buffers.tile_rows):
        rows, brackets = pair.rows(start, stop), None
        if start < num_saved:
            brackets = saved.brackets[:, start:stop]
        elif saved.jacobians is not None:
            brackets = buffers.converted(stop - start)
        in_place = start < num_saved and buffers.projects_in_place
        products = brackets if in_place and brackets is not None else buffers.tiles(stop - start)
        rows.project(products)
        parts.append(rows.read(products, buffers, brackets=brackets))
        if start >= num_saved and saved.jacobians is not None:
            assert brackets is not None
            for bracket, jacobian in zip(brackets, saved.jacobians, strict=True):
                out = jacobian[start - num_saved : stop - num_saved]
                product(bracket, rows.policy.weight, out=out)
    dtype = accumulation_dtype(pair.policy.hidden.dtype)
    like = torch.empty(0, dtype=dtype, device=saved.brackets.device)
    return PairStatistics.joined(parts, like)


def backward(
    pair: PairInputs,
    buffers: PairBuffers,
    gradients: Gradients,
    saved: SavedPair,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write the gradients, given those (N,) of log-probs, entropies and KLs; None: zeros.

    Without an entropy gradient, what the forward saved is combined; with one, every row's logits
    are computed again, because entropy asks for another combination of them.
    """
    num_rows, ignored = pair.policy.hidden.shape[0], pair.policy.ignored
    grad_logprob, grad_entropy, grad_kl = grads
    brackets, dtype = saved.brackets, accumulation_dtype(saved.brackets.dtype)
    zeros = torch.zeros(num_rows, dtype=dtype, device=brackets.device)
    upstream = PairUpstream(
        *(zeros if values is None else values.masked_fill(ignored, 0.0) for values in grads)
    )
    num_saved = 0 if grad_entropy is not None else brackets.shape[1]
    used = [index for index, values in enumerate((grad_logprob, grad_kl)) if values is not None]
    _add_saved(pair, buffers, gradients, upstream, brackets[:, :num_saved], used)
    if grad_entropy is None and saved.jacobians is not None:
        if gradients.hidden is not None:
            rest = gradients.hidden[num_saved:]
            _write_hidden(rest, saved.jacobians, upstream, ignored, used)
        return
    for start, stop in tile_spans(num_rows - num_saved, 0, buffers.tile_rows):
        start, stop = start + num_saved, stop + num_saved
        rows, products = pair.rows(start, stop), buffers.tiles(stop - start)
        gradient = buffers.converted(stop - start)[0]
        rows.project(products)
        rows.read(products, buffers, gradient=gradient, upstream=upstream.rows(start, stop))
        add_products(gradient, rows.policy, gradients.rows(start, stop), None)


def num_weight_products(
    num_rows: int,
    buffers: PairBuffers,
    saved: SavedPair,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> int:
    """Return the products that `backward` adds to the weight's gradient."""
    grad_logprob, grad_entropy, grad_kl = grads
    num_saved = 0 if grad_entropy is not None else saved.brackets.shape[1]
    combines = grad_logprob is not None and grad_kl is not None
    of_saved = len(tile_spans(num_saved, 0, buffers.tile_rows)) if combines else num_saved > 0
    return of_saved + len(tile_spans(num_rows - num_saved, 0, buffers.tile_rows))


def _add_saved(
    pair: PairInputs,
    buffers: PairBuffers,
    gradients: Gradients,
    upstream: PairUpstream,
    brackets: Tensor,
    used: list[int],
) -> None:
    """Add the gradient products of brackets (2, K, V), of which those in `used` have upstream."""
    num_saved = brackets.shape[1]
    tile_rows = max(num_saved, 1) if len(used) == 1 else buffers.tile_rows
    for start, stop in tile_spans(num_saved, 0, tile_rows):
        rows, scales = pair.rows(start, stop), upstream.rows(start, stop)
        coefficients = (scales.logprob, scales.kl)
        if len(used) == 1:
            bracket, scale = brackets[used[0], start:stop], coefficients[used[0]]
        else:
            out = buffers.converted(stop - start)[0]
            bracket, scale = _combined(brackets[:, start:stop], *coefficients, out)
        add_products(bracket, rows.policy, gradients.rows(start, stop), scale)


def _combined(
    brackets: Tensor, grad_logprob: Tensor, grad_kl: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a matrix, in `out` (n, V), and a scale (n,) whose product combines both brackets.

    The larger coefficient of a row becomes one, so that in bfloat16 only the smaller is rounded;
    they take the brackets' dtype, because PyTorch on a CPU would copy brackets into another one.
    """
    scale = torch.maximum(grad_logprob.abs(), grad_kl.abs())
    safe = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    g, k = ((values / safe).to(brackets.dtype)[:, None] for values in (grad_logprob, grad_kl))
    torch.mul(brackets[0], g, out=out).addcmul_(brackets[1], k)
    return out, scale


def _write_hidden(
    hidden: Tensor, jacobians: Tensor, upstream: PairUpstream, ignored: Tensor, used: list[int]
) -> None:
    """Write the gradient of the hidden states' last rows, from both brackets @ W of those."""
    first = ignored.shape[0] - hidden.shape[0]
    coefficients = (upstream.logprob[first:], upstream.kl[first:])
    terms = [
        scaled_rows(jacobians[i], coefficients[i], ignored[first:], torch.empty_like(jacobians[i]))
        for i in used
    ]
    hidden.copy_(sum(terms[1:], terms[0]))
