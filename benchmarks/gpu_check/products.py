"""Check the matrix products that the head asks of the library, aliased and with padded strides.

Each is compared with float64, and bitwise with the same product into memory of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_check.rows import Rows, make_parser
from fastalign.ops.head.products import add_product, product

SHAPE = (512, 1024, 4099)  # rows, width, an odd vocabulary
STRIDE_MULTIPLE = 64


@dataclass(frozen=True)
class Product:
    """One product, as the head makes it.

    Attributes:
        name: what it is, and where its result lies.
        left: (m, k).
        right: (k, n).
        out: (m, n), a view of memory that others use.
        write: called with left, right and out.
        before: content of `out` that is added to; None: it is overwritten.
    """

    name: str
    left: Tensor
    right: Tensor
    out: Tensor
    write: Callable[[Tensor, Tensor, Tensor], None]
    before: Tensor | None = None


def padded(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return an empty (rows, columns) whose rows begin at whole multiples of 128 bytes or more."""
    stride = -(-columns // STRIDE_MULTIPLE) * STRIDE_MULTIPLE
    return torch.empty(rows, stride, dtype=dtype, device=device)[:, :columns]


def products(device: str) -> list[Product]:
    """Return the products of a head of bfloat16, with contiguous and with padded rows of logits."""
    rows, width, vocabulary = SHAPE
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    hidden, weight, brackets = (
        normal(rows, width),
        normal(vocabulary, width),
        normal(rows, vocabulary),
    )
    found = []
    for kind in ("contiguous", "padded"):
        contiguous = kind == "contiguous"
        tile = (
            torch.empty(2 * rows, vocabulary, device=device)
            if contiguous
            else padded(2 * rows, vocabulary, torch.float32, device)
        )
        saved = brackets
        if not contiguous:
            saved = padded(rows, vocabulary, torch.bfloat16, device)
            saved.copy_(brackets)
        by_hidden = torch.empty(2 * rows, width, device=device)
        sums = torch.randn(vocabulary, width, generator=generator).to(device)
        low = torch.empty(vocabulary, width, dtype=torch.bfloat16, device=device)
        found += [
            Product(f"logits, float32, {kind}", hidden, weight.t(), tile[rows:], product),
            Product(f"dHidden, float32, {kind}", saved, weight, by_hidden[rows:], product),
            Product(f"dWeight, float32, {kind}", saved.t(), hidden, sums.clone(), product),
            Product(
                f"dWeight added in place, {kind}",
                saved.t(),
                hidden,
                sums.clone(),
                add_product,
                sums,
            ),
            Product(f"dWeight, bfloat16, {kind}", saved.t(), hidden, low, product),
        ]
    return found


def check(one: Product) -> dict[str, object]:
    """Return the product's error over what rounding may cost, and whether aliasing changed bits."""
    alone = torch.empty(one.out.shape, dtype=one.out.dtype, device=one.out.device)
    if one.before is not None:
        alone.copy_(one.before)
    one.write(one.left, one.right, alone)
    one.write(one.left, one.right, one.out)
    truth = one.left.double() @ one.right.double()
    terms = one.left.double().abs() @ one.right.double().abs()
    if one.before is not None:
        truth += one.before.double()
        terms += one.before.double().abs()
    # sums of k float32 products in some order, then rounded to the result's dtype
    unit = torch.finfo(torch.float32).eps * one.left.shape[1] ** 0.5
    allowed = unit * terms + torch.finfo(one.out.dtype).eps * truth.abs()
    excess = float(((one.out.double() - truth).abs() / allowed).max())
    same = torch.equal(alone, one.out)
    return {"product": one.name, "error_over_allowed": excess, "same_bits": same}


def main() -> None:
    """Check every product; exit with an error if one is wrong."""
    arguments = make_parser("products", __doc__).parse_args()
    rows, wrong = Rows(arguments.json), []
    for one in products(arguments.device):
        row = check(one)
        rows.add(row)
        if not row["error_over_allowed"] <= 1.0:  # type: ignore[operator]
            wrong.append(one.name)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
