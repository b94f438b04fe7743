"""A product whose epilogue reads its logits: log-probs without gradients, and no logits in memory.

A program multiplies a block of rows by a block of columns, and writes for each row the largest u,
the sums over the block's columns, and u at the target if that is among them: three or four numbers
in place of a block's logits. A second kernel combines the blocks of a row.

Operands come through tensor descriptors: their loads need no mask, and what lies outside is zero.

Legend: N rows, V vocabulary, D hidden, r rank.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastalign.ops.backends import triton_interprets
from fastalign.ops.head.head_tile import RowStatistics
from fastalign.ops.head.head_tile.triton_kernels import rows_of, transform_arguments
from fastalign.ops.head.operands import HeadInputs
from fastalign.ops.triton_softmax import bounded, row_transform, u_of
from fastalign.ops.triton_table import product_configuration

DESCRIPTOR_BYTES = 16  # what addresses and strides behind a descriptor are multiples of
MERGED_ROWS, MERGED_BLOCKS = 32, 16
# exp2 is one instruction, and exp four: it keeps results that are not normal numbers
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))


@triton.jit
def add_block_product(x, left, right, place, size, BLOCK_HIDDEN: tl.constexpr):
    """Return x + left @ right^T of one block of rows of each, over `size` columns."""
    row, column = place
    for start in range(0, size, BLOCK_HIDDEN):
        rows = left.load([row, start])
        columns = right.load([column, start])
        x = tl.dot(rows, columns.T, x, input_precision="ieee")
    return x


@triton.jit
def halves(x):
    """Return the left and the right half of a block, which are other registers of each thread."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def read_part(x, start, target, transform, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return u of columns from `start` on, each row's largest, and that at its target, or 0.

    u is -inf outside of the row.
    """
    bias_ptr, num_columns, cap_scale, any_target = transform
    column = start + tl.arange(0, x.shape[1])
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0)[None, :]
    u = tl.where(column[None, :] < num_columns, u_of(x, cap_scale, HAS_SOFTCAP), -float("inf"))
    at_target = tl.zeros([x.shape[0]], tl.float32)
    if any_target:
        hit = column[None, :] == target[:, None]
        at_target = tl.sum(tl.where(hit, u, 0.0), axis=1)
    return u, tl.max(u, axis=1), at_target


@triton.jit
def read_parts(x, start, target, transform, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return u of each quarter of a block, each row's largest, and that at its target, or 0."""
    width: tl.constexpr = x.shape[1] // 4
    left, right = halves(x)
    a, b = halves(left)
    c, d = halves(right)
    a, m, at = read_part(a, start, target, transform, HAS_BIAS, HAS_SOFTCAP)
    b, more, also = read_part(b, start + width, target, transform, HAS_BIAS, HAS_SOFTCAP)
    m, at = tl.maximum(m, more), at + also
    c, more, also = read_part(c, start + 2 * width, target, transform, HAS_BIAS, HAS_SOFTCAP)
    m, at = tl.maximum(m, more), at + also
    d, more, also = read_part(d, start + 3 * width, target, transform, HAS_BIAS, HAS_SOFTCAP)
    return (a, b, c, d), tl.maximum(m, more), at + also


@triton.jit
def part_sums(u, subtracted, gain, HAS_WEIGHTED: tl.constexpr):
    """Return the sums of 2^z and of z 2^z over columns, where z = (u - subtracted) gain."""
    z = (u - subtracted) * gain
    if HAS_WEIGHTED:
        z = bounded(z)
    e = tl.exp2(z)
    total = tl.sum(e, axis=1)
    weighted = total
    if HAS_WEIGHTED:
        weighted = tl.sum(e * z, axis=1)
    return total, weighted


@triton.jit
def head_product_kernel(
    hidden,
    weight,
    lora_hidden,
    lora_weight,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    num_rows,
    partial_stride,
    num_columns,
    hidden_size,
    lora_rank,
    softcap,
    logit_scale,
    group_rows,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Write the statistics of a block of rows over a block of columns."""
    # Programs that run together share their operands in L2: a group of row blocks, then columns.
    program = tl.program_id(0)
    per_group = group_rows * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first_block = program // per_group * group_rows
    group_size = tl.minimum(tl.cdiv(num_rows, BLOCK_ROWS) - first_block, group_rows)
    start_row = (first_block + program % per_group % group_size) * BLOCK_ROWS
    column_block = program % per_group // group_size
    start_column = column_block * BLOCK_COLUMNS
    place = (start_row, start_column)
    x = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    x = add_block_product(x, hidden, weight, place, hidden_size, BLOCK_HIDDEN)
    if HAS_LORA:
        x = add_block_product(x, lora_hidden, lora_weight, place, lora_rank, BLOCK_HIDDEN)
    row = start_row + tl.arange(0, BLOCK_ROWS)
    inner_row = tl.minimum(row, num_rows - 1)
    cap_scale, gain, _slope = row_transform(
        inner_row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    if HAS_TEMPERATURE:
        gain = gain[:, None]
    target = tl.load(targets_ptr + inner_row)
    here = (target >= start_column) & (target < start_column + BLOCK_COLUMNS)
    here = here & (target < num_columns) & (row < num_rows)
    # Quarter by quarter, for the sums of a whole block would not fit into registers beside it.
    any_target = tl.max(here.to(tl.int32), axis=0) > 0
    transform = (bias_ptr, num_columns, cap_scale, any_target)
    parts, m, at_target = read_parts(
        x, start_column, target.to(tl.int32), transform, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(target_ptr + row, at_target, mask=here)
    subtracted = tl.where(m == -float("inf"), 0.0, m)[:, None]
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    for i in tl.static_range(4):
        of_part, weighted_of_part = part_sums(parts[i], subtracted, gain * LOG2_E, HAS_WEIGHTED)
        total += of_part
        weighted += weighted_of_part
    # rows behind the last one have memory of their own
    partial = column_block.to(tl.int64) * partial_stride + row
    tl.store(maximum_ptr + partial, m)
    tl.store(total_ptr + partial, total)
    if HAS_WEIGHTED:
        tl.store(weighted_ptr + partial, weighted * LN_2)


@triton.jit
def head_product_merge_kernel(
    ignored_ptr,
    temperature_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    logprob_ptr,
    entropy_ptr,
    is_argmax_ptr,
    num_rows,
    partial_stride,
    num_blocks,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the statistics of a block of rows over all columns."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    _cap_scale, gain, _slope = row_transform(
        tl.minimum(row, num_rows - 1),
        temperature_ptr,
        softcap,
        logit_scale,
        HAS_TEMPERATURE,
        HAS_SOFTCAP,
    )
    m = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[:, None]
        partial = block.to(tl.int64) * partial_stride + row[None, :]
        of_block = tl.load(maximum_ptr + partial, mask=block < num_blocks, other=-float("inf"))
        m = tl.maximum(m, tl.max(of_block, axis=0))
    subtracted = tl.where(m == -float("inf"), 0.0, m)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[:, None]
        partial = block.to(tl.int64) * partial_stride + row[None, :]
        known = block < num_blocks
        of_block = tl.load(maximum_ptr + partial, mask=known, other=-float("inf"))
        drop = bounded((of_block - subtracted) * gain)
        shrink = tl.exp(drop)
        of_block = tl.load(total_ptr + partial, mask=known, other=0.0)
        total += tl.sum(shrink * of_block, axis=0)
        if HAS_WEIGHTED:
            more = tl.load(weighted_ptr + partial, mask=known, other=0.0)
            weighted += tl.sum(shrink * (more + drop * of_block), axis=0)
    log_total = tl.log(total)
    is_target = tl.load(ignored_ptr + row, mask=inside, other=1) == 0
    shifted = (tl.load(target_ptr + row, mask=inside, other=0.0) - subtracted) * gain
    tl.store(logprob_ptr + row, tl.where(is_target, shifted - log_total, 0.0), mask=inside)
    entropy = tl.zeros([BLOCK_ROWS], tl.float32)
    if HAS_WEIGHTED:
        entropy = log_total - weighted / total
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
    tl.store(entropy_ptr + row, tl.where(is_target, entropy, 0.0), mask=inside)
    tl.store(is_argmax_ptr + row, (is_target & (shifted >= 0.0)).to(tl.int8), mask=inside)


def read(head: HeadInputs, with_entropy: bool) -> RowStatistics:
    """See `head_product.read_products`."""
    (num_rows, hidden_size), num_columns = head.hidden.shape, head.weight.shape[0]
    found = RowStatistics.empty(num_rows, head.hidden.device)
    if num_rows == 0:
        return found
    options = product_configuration(head.hidden.element_size(), head.hidden.device).options()
    row_blocks = triton.cdiv(num_rows, options["BLOCK_ROWS"])
    num_blocks = triton.cdiv(num_columns, options["BLOCK_COLUMNS"])
    shape = (3 if with_entropy else 2, num_blocks, row_blocks * options["BLOCK_ROWS"])
    partials = torch.empty(shape, dtype=torch.float32, device=head.hidden.device)
    # of a target that is no column NaN stays
    target = torch.full_like(found.logprob, torch.nan)
    temperature = rows_of(head.transform.temperature, num_rows, found.logprob)
    results = (partials[0], partials[1], partials[-1], target)
    shared = {
        "partial_stride": partials.stride(1),
        "HAS_WEIGHTED": with_entropy,
        **transform_arguments(head.transform),
    }
    head_product_kernel[(row_blocks * num_blocks,)](
        *descriptors(head, options),
        found.logprob if head.bias is None else head.bias.contiguous(),
        head.targets.contiguous(),
        temperature,
        *results,
        num_rows,
        num_columns=num_columns,
        hidden_size=hidden_size,
        lora_rank=0 if head.lora_hidden is None else head.lora_hidden.shape[1],
        HAS_BIAS=head.bias is not None,
        HAS_LORA=head.lora_hidden is not None,
        **shared,
        **options,
    )
    merged_rows = min(MERGED_ROWS, options["BLOCK_ROWS"])
    head_product_merge_kernel[(triton.cdiv(num_rows, merged_rows),)](
        head.ignored.contiguous().view(torch.int8),
        temperature,
        *results,
        found.logprob,
        found.entropy,
        found.is_argmax.view(torch.int8),
        num_rows,
        num_blocks=num_blocks,
        BLOCK_ROWS=merged_rows,
        BLOCKS=MERGED_BLOCKS,
        **shared,
    )
    return found


def descriptors(head: HeadInputs, options: dict[str, int]) -> list[TensorDescriptor]:
    """Return descriptors of hidden states and weight, and LoRA's; without LoRA the same twice."""
    pairs = [(head.hidden, head.weight)]
    if head.lora_hidden is not None and head.lora_weight is not None:
        pairs.append((head.lora_hidden, head.lora_weight))
    found = [
        descriptor(matrix, options[rows], options["BLOCK_HIDDEN"])
        for pair in pairs
        for matrix, rows in zip(pair, ("BLOCK_ROWS", "BLOCK_COLUMNS"), strict=True)
    ]
    return found if len(pairs) == 2 else 2 * found


def descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Return a descriptor of blocks of a matrix; a copy's where its rows are not at 16 bytes."""
    if triton_interprets():
        matrix = matrix.float()  # whose products of bfloat16 are wrong
    num_columns, multiple = matrix.shape[1], DESCRIPTOR_BYTES // matrix.element_size()
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % multiple == 0
    if not aligned or matrix.data_ptr() % DESCRIPTOR_BYTES:
        width = -(-num_columns // multiple) * multiple
        matrix = matrix.new_empty(matrix.shape[0], width)[:, :num_columns].copy_(matrix)
    return TensorDescriptor.from_tensor(matrix, [block_rows, block_columns])
