"""A head's loss and gradients on paper: bytes, FLOPs and milliseconds of each design, on any chip.

    python -m benchmarks.paper --shape 4096 4096 128256 --chip h200

prints what each design has to move beside its matrix products, and how long that takes, so that a
GPU's figures can be laid beside it. Nothing is run. What our own designs allocate and how they cut
a call into chunks comes from the plan of their buffers (`fastalign.ops.head.footprint`).

A step that touches memory is taken to run at `MEMORY_SHARE` of the chip's copy. What a product
reads and writes beyond a bare one (a float32 output, an output that is added to) is half hidden
behind its arithmetic.

Legend: T tokens, D hidden, V vocabulary.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastalign.ops.head.buffers import Budget, default_budget
from fastalign.ops.head.footprint import Footprint, footprint
from fastalign.ops.head.products import accumulation_dtype, product_dtype
from fastalign.ops.triton_table import newest, read_products

MEMORY_SHARE = 0.85
HIDDEN_BEHIND_A_PRODUCT = 0.5
# An own product with an epilogue, as a share of the library's speed: worst and best. No GPU has
# measured it: these are assumptions.
OWN_PRODUCT = (0.88, 0.95)
EPILOGUE_COLUMNS = 128  # of a product's tile, which leaves a maximum and two sums a row
# Of the SMs, 6 of 132: they read a chunk's logits, at 60 GB/s each, while the others multiply.
READING_SMS = 6 / 132
FORWARD_CHUNKS = 8
# Strips of 1,024 columns, 16.8 MB of float32 at 4,096 tokens: L2 holds one beside its product's
# operands, and is read 1.5 times as fast as memory. Each product takes 46 us, and 4 us to begin and
# to end.
L2_SPEED = 1.5
STRIP_PRODUCT = 46 / 50
HOPPER = 90
BLOCKS = [entry for entry in read_products() if entry.element_bytes == 2]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Chip:
    """Speeds that a chip reaches: products in bfloat16, FLOP a second; a copy, bytes a second."""

    products: float
    copy: float

    @staticmethod
    def of_data_sheet(peak_tflops: float, terabytes: float) -> "Chip":
        """Return a chip that reaches the shares of its data sheet that an H200 does."""
        return Chip(peak_tflops * 1e12 * 745 / 989, terabytes * 1e12 * 4.3 / 4.8)


CHIPS = {
    "h200": Chip(745e12, 4.3e12),  # measured
    "h100": Chip.of_data_sheet(989, 3.35),
    "a100": Chip.of_data_sheet(312, 2.04),
    "b200": Chip.of_data_sheet(2250, 8.0),
}


@dataclass(frozen=True)
class Shape:
    """One call: T tokens, D hidden, V vocabulary, and the dtype of hidden states and weight."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    leaf: torch.dtype = torch.bfloat16

    @property
    def logits(self) -> int:
        """T * V."""
        return self.num_tokens * self.vocab_size

    @property
    def rows(self) -> int:
        """T * D."""
        return self.num_tokens * self.hidden_size

    @property
    def weight(self) -> int:
        """V * D."""
        return self.vocab_size * self.hidden_size

    @property
    def low(self) -> int:
        """Bytes of an element of the products' operands."""
        return product_dtype(torch.bfloat16, "cuda").itemsize

    @property
    def wide(self) -> int:
        """Bytes of an element that is accumulated."""
        return accumulation_dtype(torch.bfloat16).itemsize

    def plan(self) -> Footprint:
        """Return how our code cuts this call, with its default budget on a GPU."""
        device, dtype = torch.device("cuda"), torch.bfloat16
        limit = default_budget(self.vocab_size, dtype, device, within_free_memory=False)
        budget = Budget(self.vocab_size, dtype, device, limit, "native", save=True, convert=True)
        return footprint(budget, self.num_tokens, self.hidden_size, self.leaf)


@dataclass(frozen=True)
class Step:
    """Bytes that a step moves; `hidden` of them behind a product's arithmetic."""

    name: str
    num_bytes: float
    hidden: float = 0.0


@dataclass(frozen=True)
class Design:
    """Costs of a design.

    Attributes:
        num_products: products of T x D x V.
        steps: what it moves beside them.
        slower_products: products of an own kernel, or of the library in pieces or on fewer SMs.
        speed: speed of those as a share of the library's.
        peak_bytes: most that our code allocates at one time; None where it is not ours.
    """

    num_products: int
    steps: tuple[Step, ...]
    slower_products: int = 0
    speed: float = 1.0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Prediction:
    """A design on a chip."""

    design: str
    flops: float
    num_bytes: float
    milliseconds: float
    ratio_to_products: float
    steps_milliseconds: dict[str, float]
    peak_bytes: int | None


def beside_a_product(name: str, num_bytes: float) -> Step:
    """Return a step that a product's arithmetic half hides."""
    return Step(name, num_bytes, HIDDEN_BEHIND_A_PRODUCT)


def tile_pass(shape: Shape, reads: int) -> Step:
    """Return the pass over float32 logits that writes the brackets in the products' dtype."""
    return Step(f"tile pass, {reads} read(s)", shape.logits * (reads * shape.wide + shape.low))


def cast_steps(shape: Shape) -> tuple[Step, ...]:
    """Return the copy of a float32 weight in the products' dtype."""
    leaf, low = shape.leaf.itemsize, shape.low
    if leaf == low:
        return ()
    return (Step("weight in the products' dtype", shape.weight * (leaf + low)),)


def jacobian_steps(shape: Shape) -> tuple[Step, ...]:
    """Return the hidden states' gradient: a float32 product, multiplied, masked and rounded."""
    leaf, wide = shape.leaf.itemsize, shape.wide
    return (
        beside_a_product("float32 Jacobian", shape.rows * (wide - shape.low)),
        Step("Jacobian times coefficients", shape.rows * (wide + 3 * leaf)),
    )


def weighted_rows(shape: Shape) -> Step:
    """Return the rows that the weight's product takes: hidden states times coefficients."""
    return Step("rows times coefficients", shape.rows * (shape.leaf.itemsize + 3 * shape.low))


def weight_steps(shape: Shape, num_chunks: int) -> tuple[Step, ...]:
    """Return what our weight's gradient moves beyond one product in the weight's dtype."""
    leaf, wide = shape.leaf.itemsize, shape.wide
    if num_chunks == 1:
        return ()
    more = (num_chunks - 1) * 2 * wide + (wide - leaf)
    return (
        beside_a_product("sum of dWeight over chunks", shape.weight * more),
        Step("dWeight times upstream, cast", shape.weight * (wide + leaf)),
    )


def before(shape: Shape) -> Design:
    """Return the design before A1: zeros, a sum in float32, a multiplication, a cast."""
    plan, leaf, wide = shape.plan(), shape.leaf.itemsize, shape.wide
    old_rows = shape.rows * (2 * wide + 3 * wide + leaf + 2 * leaf)
    old_weighted = shape.rows * (leaf + 6 * wide - wide + shape.low)
    steps = (
        *cast_steps(shape),
        tile_pass(shape, reads=2),
        Step("dWeight: zeros", shape.weight * wide),
        beside_a_product(
            "dWeight: added to", shape.weight * (2 * wide * plan.num_chunks - shape.low)
        ),
        Step("dWeight: times upstream", shape.weight * 2 * wide),
        Step("dWeight: cast", shape.weight * (wide + leaf) if shape.leaf.itemsize < wide else 0),
        Step("rows", old_rows + old_weighted),
    )
    return Design(3, steps)


def ours(shape: Shape, reads: int) -> Design:
    """Return A1 (two reads of the logits) or A2 (one)."""
    plan = shape.plan()
    steps = (
        *cast_steps(shape),
        tile_pass(shape, reads),
        *jacobian_steps(shape),
        weighted_rows(shape),
        *weight_steps(shape, plan.num_chunks),
    )
    return Design(3, steps, peak_bytes=plan.peak)


def epilogue_steps(shape: Shape) -> tuple[Step, ...]:
    """Return the statistics that an epilogue leaves for each row and block of columns."""
    blocks = -(-shape.vocab_size // EPILOGUE_COLUMNS)
    return (Step("statistics of blocks", 2 * shape.num_tokens * blocks * 3 * shape.wide),)


def in_the_epilogue(shape: Shape, own_product: float) -> Design:
    """Return A3: exponentials and statistics in the first product's epilogue, no pass."""
    # the targets' own part: rows of the weight are gathered, rows of dWeight are added to
    targets = Step("targets", shape.rows * (2 * shape.low + 2 * shape.low))
    steps = (
        *cast_steps(shape),
        *epilogue_steps(shape),
        targets,
        *jacobian_steps(shape),
        weighted_rows(shape),
        *weight_steps(shape, shape.plan().num_chunks),
    )
    return Design(3, steps, slower_products=1, speed=own_product)


def quack(shape: Shape) -> Design:
    """Return QuACK's published scheme: bfloat16 logits, overwritten by their gradient."""
    steps = (Step("tile pass in place", shape.logits * 2 * shape.low), weighted_rows(shape))
    return Design(3, steps)


def frozen(shape: Shape, reads: int) -> Design:
    """Return a loss whose head is not trained: the hidden states' gradient alone."""
    return Design(2, (*cast_steps(shape), tile_pass(shape, reads), *jacobian_steps(shape)))


def forward(shape: Shape) -> Design:
    """Return a loss without gradients: float32 logits are read once."""
    return Design(1, (*cast_steps(shape), Step("statistics", shape.logits * shape.wide)))


def forward_in_the_epilogue(shape: Shape, own_product: float) -> Design:
    """Return backend "epilogue": log-probs of logits that are never written.

    `own_product` is assumed. A row of each block of columns leaves a maximum and a sum.
    """
    blocks = -(-shape.vocab_size // newest(BLOCKS, HOPPER).block_columns)
    kept = 2 * shape.wide * shape.num_tokens * blocks
    steps = (*cast_steps(shape), Step("statistics of blocks", 2 * kept))
    return Design(1, steps, 1, own_product, kept)


def forward_beside(shape: Shape) -> Design:
    """Return a loss without gradients whose pass over a chunk runs beside the next one's product.

    Both are the library's and ours as they are, on two streams; the last chunk's pass is alone.
    """
    last = Step("statistics of the last chunk", shape.logits * shape.wide / FORWARD_CHUNKS)
    return Design(1, (*cast_steps(shape), last), 1, 1 - READING_SMS)


def forward_in_strips(shape: Shape) -> Design:
    """Return a loss without gradients whose logits are read from L2, strip by strip of columns."""
    read = Step("statistics from L2", shape.logits * shape.wide, hidden=1 - 1 / L2_SPEED)
    return Design(1, (*cast_steps(shape), read), 1, STRIP_PRODUCT)


DESIGNS: dict[str, Callable[[Shape], Design]] = {
    "before A1": before,
    "A1": lambda shape: ours(shape, reads=2),
    "A2": lambda shape: ours(shape, reads=1),
    "A3, worst": lambda shape: in_the_epilogue(shape, OWN_PRODUCT[0]),
    "A3, best": lambda shape: in_the_epilogue(shape, OWN_PRODUCT[1]),
    "QuACK, published": quack,
    "frozen, two reads": lambda shape: frozen(shape, reads=2),
    "frozen, one read": lambda shape: frozen(shape, reads=1),
    "forward": forward,
    "forward, two streams": forward_beside,
    "forward, L2 strips": forward_in_strips,
    "forward, epilogue 88 %": lambda shape: forward_in_the_epilogue(shape, 0.88),
    "forward, epilogue 91 %": lambda shape: forward_in_the_epilogue(shape, 0.91),
    "forward, epilogue 95 %": lambda shape: forward_in_the_epilogue(shape, 0.95),
}


def predict(name: str, shape: Shape, chip: Chip) -> Prediction:
    """Return what a design takes on a chip."""
    design = DESIGNS[name](shape)
    flops = 2.0 * shape.logits * shape.hidden_size
    one_product = 1e3 * flops / chip.products
    bare = design.num_products * one_product
    steps = {
        step.name: 1e3 * step.num_bytes * (1 - step.hidden) / (MEMORY_SHARE * chip.copy)
        for step in design.steps
    }
    if design.slower_products:
        extra = design.slower_products * one_product * (1 / design.speed - 1)
        steps[f"product at {design.speed:.0%} of the library's speed"] = extra
    total = bare + sum(steps.values())
    return Prediction(
        name,
        design.num_products * flops,
        sum(step.num_bytes for step in design.steps),
        total,
        total / bare,
        steps,
        design.peak_bytes,
    )


def print_predictions(predictions: list[Prediction]) -> None:
    """Print a table of the designs, and below each what it takes beside its products."""
    print(f"{'design':22}{'TFLOP':>8}{'GB beside':>11}{'ms':>9}{'/ products':>12}{'peak GB':>9}")
    for found in predictions:
        peak = "" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f}"
        print(
            f"{found.design:22}{found.flops / 1e12:8.2f}{found.num_bytes / 1e9:11.2f}"
            f"{found.milliseconds:9.2f}{found.ratio_to_products:12.3f}{peak:>9}"
        )
        for name, milliseconds in found.steps_milliseconds.items():
            print(f"    {name:40}{milliseconds:8.3f} ms")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 4096, 128256), metavar="N")
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--tflops", type=float, help="products, in place of the chip's")
    parser.add_argument("--terabytes", type=float, help="copy, TB/s, in place of the chip's")
    parser.add_argument("--leaf", choices=DTYPES, default="bfloat16", help="dtype of the weight")
    parser.add_argument("--json", type=Path, help="also write the predictions here")
    options = parser.parse_args(arguments)
    if min(options.shape) < 1:
        parser.error(f"--shape: expected three positive numbers, got {options.shape}")
    chip, shape = CHIPS[options.chip], Shape(*options.shape, DTYPES[options.leaf])
    chip = Chip(
        chip.products if options.tflops is None else 1e12 * options.tflops,
        chip.copy if options.terabytes is None else 1e12 * options.terabytes,
    )
    found = [predict(name, shape, chip) for name in DESIGNS]
    print_predictions(found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
