"""Operands of a pass over a head, the gradients that are wanted, and where they are written.

Legend: N rows, V vocabulary, D hidden, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastalign.ops.head.head_tile import HeadTransform, Tile
from fastalign.ops.head.products import ProductSum, add_product, multiplied, product


@dataclass(frozen=True)
class HeadInputs:
    """The operands of one pass over a head."""

    hidden: Tensor  # (N, D), in the products' dtype
    weight: Tensor  # (V, D), in the products' dtype
    bias: Tensor | None  # (V,), in the accumulation dtype
    targets: Tensor  # (N,) int64, in range even where ignored
    ignored: Tensor  # (N,) bool
    transform: HeadTransform
    # Of an adapted head, both or none, in the products' dtype; logits get their product too.
    lora_hidden: Tensor | None = None  # (N, r)
    lora_weight: Tensor | None = None  # (V, r)

    def rows(self, start: int, stop: int) -> "HeadInputs":
        """Return the same head on rows start..stop."""
        return HeadInputs(
            self.hidden[start:stop],
            self.weight,
            self.bias,
            self.targets[start:stop],
            self.ignored[start:stop],
            self.transform.rows(start, stop),
            None if self.lora_hidden is None else self.lora_hidden[start:stop],
            self.lora_weight,
        )

    def project(self, out: Tensor) -> None:
        """Write the products plus bias, (N, V), into `out`."""
        if out.shape[1] == 0:  # the empty shard of a rank
            return
        product(self.hidden, self.weight.t(), out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.lora_hidden is not None and self.lora_weight is not None:
            add_product(self.lora_hidden, self.lora_weight.t(), out=out)

    def tile(self, products: Tensor) -> Tile:
        """Return products (N, V) of these rows as a tile."""
        return Tile(products, self.targets, self.ignored, self.transform)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_hidden: bool = False
    lora_weight: bool = False

    @property
    def any(self) -> bool:
        """True if any gradient is wanted."""
        return self.hidden or self.brackets

    @property
    def only_hidden(self) -> bool:
        """True if all that the backward needs is bracket @ W, the Jacobian by the hidden states."""
        return self.hidden and not self.brackets

    @property
    def brackets(self) -> bool:
        """True if the brackets themselves are needed after the forward."""
        return self.weight or self.bias or self.lora_hidden or self.lora_weight


@dataclass(frozen=True)
class Gradients:
    """Gradients that a backward writes (of rows) or adds to (the others); None: not wanted."""

    hidden: Tensor | None  # (N, D), any float dtype
    weight: ProductSum | None  # (V, D)
    bias: ProductSum | None  # (V,)
    lora_hidden: Tensor | None = None  # (N, r), any float dtype
    lora_weight: ProductSum | None = None  # (V, r)

    @property
    def needs(self) -> Needs:
        """Which gradients are wanted."""
        found = (self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight)
        return Needs(*(value is not None for value in found))

    def rows(self, start: int, stop: int) -> "Gradients":
        """Return the same gradients, those that have a row for each token on rows start..stop."""
        hidden, lora_hidden = (
            None if value is None else value[start:stop]
            for value in (self.hidden, self.lora_hidden)
        )
        return Gradients(hidden, self.weight, self.bias, lora_hidden, self.lora_weight)

    def results(
        self, leaves: Sequence[Tensor | None], scale: Tensor | None = None
    ) -> list[Tensor | None]:
        """Return each gradient times `scale` () in its leaf's dtype, in the order of `Needs`.

        They may be asked for once: the memory of the sums is theirs.
        """
        found = (self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight)
        results: list[Tensor | None] = []
        for gradient, leaf in zip(found, leaves, strict=True):
            if gradient is None or leaf is None:
                results.append(None)
            elif isinstance(gradient, ProductSum):
                results.append(gradient.result(scale))
            else:
                results.append(multiplied(gradient, scale, leaf.dtype))
        return results
