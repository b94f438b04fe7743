"""The Triton kernels compile ahead of time for GPUs that are not here, as they are launched."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator

import pytest

import fastalign.ops
from fastalign.ops import triton_table
from tests.ops.ahead_of_time import Resources, access_bits, compiler, fewest_accesses

VOCABULARY = 128_256
# 1,024 threads of the plain kernels run on a multiprocessor, of 65,536 registers; with all options
# 768, and of those over packed responses, whose scans are float64, 384.
MAX_REGISTERS, MAX_REGISTERS_OF_ALL, MAX_REGISTERS_OF_PACKED = 64, 80, 168
# For reductions over warps: a few words each. In token_kl's backward a block of another dtype
# changes its layout there.
MAX_SHARED_BYTES, MAX_SHARED_BYTES_OF_TWO_DTYPES = 1024, 8192
# A block of a product has a multiprocessor to itself, and a thread as many registers as can be.
PRODUCT, MAX_SHARED_BYTES_OF_PRODUCTS = "head_product_kernel", 232_448


Compile = Callable[..., list[Resources]]


@pytest.fixture(scope="module")
def compile_for() -> Iterator[Compile]:
    with compiler() as compile_launches:
        yield compile_launches


def compiled(compile_for: Compile, architecture: int) -> list[Resources]:
    options = (False, True) if architecture == 90 else (True,)
    return [
        one
        for everything in options
        for one in compile_for(architecture, VOCABULARY, everything=everything)
    ]


@pytest.fixture(scope="module")
def hopper(compile_for: Compile) -> list[Resources]:
    return compiled(compile_for, 90)


def assert_light(found: list[Resources]) -> None:
    for one in found:
        assert one.local_bytes == 0, one  # nothing is spilt
        if one.kernel == PRODUCT:
            assert one.shared_bytes <= MAX_SHARED_BYTES_OF_PRODUCTS, one
            continue
        two_dtypes = one.kernel == "token_kl_bwd_kernel" and "bfloat16" not in one.launch
        shared = MAX_SHARED_BYTES_OF_TWO_DTYPES if two_dtypes else MAX_SHARED_BYTES
        assert one.shared_bytes <= shared, one
        registers = MAX_REGISTERS if one.launch.endswith("plain") else MAX_REGISTERS_OF_ALL
        limit = registers if one.reads_rows else MAX_REGISTERS_OF_PACKED
        assert one.registers <= limit, one


def assert_wide(found: list[Resources]) -> None:
    for one in found:
        if one.kernel == PRODUCT:
            assert one.descriptor_loads > 0, one
        elif one.kernel == "head_product_merge_kernel":
            assert one.widest_access == 128, one
        elif one.reads_rows:
            assert one.accesses == one.fewest_accesses, one


def test_kernels_are_light(hopper: list[Resources]) -> None:
    assert_light(hopper)


def test_rows_are_read_and_written_128_bits_at_a_time(hopper: list[Resources]) -> None:
    assert_wide(hopper)


@pytest.mark.parametrize("architecture", [80, 100])
def test_kernels_are_light_and_wide_on(compile_for: Compile, architecture: int) -> None:
    found = compiled(compile_for, architecture)
    assert_light(found)
    assert_wide(found)


@pytest.mark.parametrize("everything", [False, True])
def test_rows_of_an_odd_vocabulary_are_too(compile_for: Compile, everything: bool) -> None:
    """Rows are padded, as those of a head's buffers are; of contiguous ones Triton reads scalars.

    Their addresses are multiples of an element's size alone.
    """
    found = compile_for(90, VOCABULARY + 1, everything=everything, only_rows=True)
    assert all(one.reads_rows for one in found)
    assert_light(found)
    assert_wide(found)


def test_every_kernel_is_launched(hopper: list[Resources]) -> None:
    modules = pkgutil.walk_packages(fastalign.ops.__path__, "fastalign.ops.")
    names = {
        kernel
        for module in modules
        if module.name.endswith(".triton_kernels")
        for kernel in vars(importlib.import_module(module.name))
        if kernel.endswith("_kernel")
    }
    assert names == {one.kernel for one in hopper}
    assert {*triton_table.read_table(), triton_table.PRODUCT} <= names


def test_products_run_on_tensor_cores(hopper: list[Resources]) -> None:
    """Each block that is loaded by descriptors, of both operands, is multiplied where it lies."""
    found = {one.launch: one.warpgroup_products for one in hopper if one.kernel == PRODUCT}
    assert len(found) == 5
    for launch, products in found.items():
        assert (products > 0) == ("float32" not in launch), launch


def test_accesses_are_counted() -> None:
    ptx = """
        .param .u64 .ptr .global .align 1 some_kernel_param_0,
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd1 ];
        @!%p2 st.global.b32 [ %rd5 + 0 ], { %r5 };
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    """
    ttgir = """
        %target = tt.load %1 : !tt.ptr<i64> loc(#loc1)
        %x = tt.load %2, %3, %4 : tensor<4096x!tt.ptr<f32>, #blocked> loc(#loc2)
        tt.store %5, %6, %7 : tensor<4096x!tt.ptr<bf16>, #blocked> loc(#loc3)
        tt.store %8, %9, %10 : tensor<1024x!tt.ptr<bf16>, #blocked> loc(#loc4)
        %y = tt.load %11 : tensor<2048x!tt.ptr<f32>, #blocked> loc(#loc5)
    """
    assert access_bits(ptx) == [128, 128, 32]
    assert fewest_accesses(ttgir, 256) == 1 + 4 + 2 + 1 + 2


def test_a_gpu_takes_the_newest_configuration_that_is_not_newer() -> None:
    table = [triton_table.Configuration(c, c * 10, 8, None) for c in (100, 90, 80)]
    found = [triton_table.newest(table, c).block for c in (75, 80, 89, 90, 120)]
    assert found == [800, 800, 800, 900, 1000]
