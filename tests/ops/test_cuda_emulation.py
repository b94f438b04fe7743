"""The CUDA kernels on a CPU: the operations' own tests in two orders of threads; planted faults.

The kernels are compiled as C++ (`cuda_emulation`), and `backend="native"` of CPU tensors runs them.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastalign.ops import native_library, token_logprob
from fastalign.ops.backends import choose_backend
from fastalign.ops.head.head_tile import HeadTransform, Tile, read_tile
from tests.ops import test_gae, test_kl_penalty, test_preference_loss, test_token_kl
from tests.ops import test_token_logprob as of_token_logprob
from tests.ops.cuda_emulation.build import ROOT, SANITIZERS, build
from tests.ops.cuda_emulation.library import ORDERS, EmulatedLibrary, cases_of
from tests.ops.head import test_kl_tile
from tests.ops.head.head_tile import head_tile_cases, test_head_tile, test_head_tile_split

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# Path of a library that is built already: the run with sanitizers, below, sets it.
BUILT = "FASTALIGN_TEST_EMULATED"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    """All kernels, built once."""
    built = os.environ.get(BUILT)
    return EmulatedLibrary(Path(built) if built else build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, library: EmulatedLibrary) -> Iterator[str]:
    """The backend whose kernels are emulated, threads in one of the orders."""
    with library.used(request.param):
        yield "native"


TestTokenLogprob = cases_of(of_token_logprob)
TestTokenKL = cases_of(test_token_kl)
TestPreferenceLoss = cases_of(test_preference_loss)
TestKLPenalty = cases_of(test_kl_penalty)
TestGae = cases_of(test_gae)
TestHeadTile = cases_of(test_head_tile)
TestHeadTileSplit = cases_of(test_head_tile_split)
TestKLTile = cases_of(test_kl_tile)


def test_every_cuda_function_is_in_the_library_and_is_called(
    backend: str, library: EmulatedLibrary
) -> None:
    names = re.findall(r"^FASTALIGN_BOTH\((\w+),", (ROOT / "csrc/abi.h").read_text(), re.MULTILINE)
    assert "head_tile" in names
    for name in names:
        assert library.entry_point(name, torch.device("cpu")).function.__name__.endswith("_cuda")
    before = library.calls["token_logprob_forward"]
    token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]), backend=backend)
    assert library.calls["token_logprob_forward"] == before + 1


def test_ten_thousand_tokens(backend: str) -> None:
    for numbers in test_gae.NUMBERS[:2]:
        test_gae.test_ten_thousand_tokens(numbers)


# Rows of a head's tile that a cluster of blocks keeps: from the shortest such row on; the last
# block's part is short, or there is none for it.
LONG_ROWS = [16_384, 16_385, 17_000, 50_257]


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("num_columns", LONG_ROWS)
def test_long_rows_of_a_tile(
    backend: str,
    library: EmulatedLibrary,
    monkeypatch: pytest.MonkeyPatch,
    num_columns: int,
    capability: int,
) -> None:
    monkeypatch.setenv("FASTALIGN_EMULATION_CAPABILITY", str(capability))
    head_tile_cases.check_long_rows(num_columns, "everything", "native")
    assert library.cluster_size == (8 if capability == 9 else 1)


def test_a_tile_without_a_gradient_or_with_short_or_unaligned_rows_needs_no_cluster(
    backend: str, library: EmulatedLibrary
) -> None:
    for num_columns, stride, has_gradient in (
        (16_383, 16_384, True),
        (16_384, 16_385, True),
        (16_384, 16_384, False),
    ):
        products = torch.zeros(2, stride)[:, :num_columns]
        tile = Tile(products, torch.tensor([0, 5]), torch.zeros(2).bool(), HeadTransform())
        read_tile(tile, backend, None, gradient=products if has_gradient else None)
        assert library.cluster_size == 1


def test_a_target_that_is_no_column_of_a_long_row_gives_nan(
    backend: str, library: EmulatedLibrary
) -> None:
    products = torch.zeros(3, 16_384)
    tile = Tile(products, torch.tensor([0, 16_384, -1]), torch.zeros(3).bool(), HeadTransform())
    read = read_tile(tile, backend, None, gradient=products)
    assert library.cluster_size == 8
    assert read.logprob.isnan().tolist() == [False, True, True]
    assert products.isnan().all(1).tolist() == [False, True, True]
    assert products[0].isfinite().all()


@pytest.mark.parametrize("dtype", of_token_logprob.DTYPES, ids=str)
def test_long_rows_of_logits(backend: str, dtype: torch.dtype) -> None:
    of_token_logprob.test_values_and_gradients_are_no_worse_than_eager(
        backend, (2, 50_257), dtype, of_token_logprob.CASES[2]
    )


def test_long_rows_of_two_tiles(backend: str) -> None:
    test_kl_tile.test_statistics_and_gradients(backend, (2, 12_289), "everything", False)


def test_a_failed_launch_names_cuda_s_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTALIGN_EMULATION_ERROR", "209")
    with pytest.raises(
        RuntimeError, match="token_logprob_forward: cudaErrorNoKernelImageForDevice: "
    ):
        token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]), backend=backend)


@pytest.mark.parametrize("error", ["209", "35"])
def test_auto_takes_triton_where_the_gpu_or_its_driver_runs_no_native_kernel(
    library: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    monkeypatch.setattr(native_library, "_load", lambda device_type: library.loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    names = {"209": "cudaErrorNoKernelImageForDevice", "35": "cudaErrorInsufficientDriver"}
    native_library.gpu_reason.cache_clear()
    try:
        assert choose_backend("token_logprob", "auto", "cuda", torch.float32) == "native"
        native_library.gpu_reason.cache_clear()
        monkeypatch.setenv("FASTALIGN_EMULATION_ERROR", error)
        assert choose_backend("token_logprob", "auto", "cuda", torch.float32) == "triton"
        reason = f"Tesla T4 .*{names[error]}.*FASTALIGN_CUDA_ARCHITECTURES=75"
        with pytest.raises(ValueError, match=reason):
            choose_backend("token_logprob", "native", "cuda", torch.float32)
    finally:
        native_library.gpu_reason.cache_clear()


@dataclass(frozen=True)
class Fault:
    """A fault to plant, and the case that has to find it.

    Attributes:
        source: stem of the source to compile.
        change: file name, text, and the text that replaces it.
        case: the operations' own test that fails; it passes without the fault, above.
    """

    source: str
    change: tuple[str, str, str]
    case: Callable[[], None]


def of_strided_tile() -> None:
    test_head_tile.test_a_strided_tile_and_what_lies_beside_it("native")


def of_rows_with_a_margin() -> None:
    tile, targets, ignored = head_tile_cases.products(6, 45)
    transform, place = head_tile_cases.transform_of("plain", 6), torch.full((7, 64), 7.0)
    head_tile_cases.run(
        tile, targets, ignored, transform, (True, True), "native", gradient=place[:6, :45]
    )
    assert place[:, 45:].eq(7.0).all()
    assert place[6].eq(7.0).all()


def of_rows_in_a_cluster() -> None:
    head_tile_cases.check_long_rows(LONG_ROWS[0], "plain", "native")


def of_long_tile() -> None:
    test_head_tile.test_statistics_and_gradients("native", (4, 5000), "plain")


FAULTS = {
    "a reduction's barrier is missing": Fault(
        "token_logprob",
        ("reduce.cuh", "__syncthreads();", ""),
        lambda: of_token_logprob.test_values_and_gradients_are_no_worse_than_eager(
            "native", (3, 2000), torch.float32, of_token_logprob.CASES[0]
        ),
    ),
    "the target is overwritten before all have read it": Fault(
        "head_tile", ("head_tile.cu", "__syncthreads();", ""), of_long_tile
    ),
    "one buffer in place of two": Fault(
        "gae",
        ("gae.cu", "of_warp[tile / THREADS % 2]", "of_warp[0]"),
        lambda: test_gae.test_ten_thousand_tokens((1.0, 0.95)),
    ),
    "the alignment is not checked": Fault(
        "head_tile",
        ("head_tile.cuh", "reinterpret_cast<uintptr_t>(start) % 16 == 0 && stride", "0 * stride"),
        of_strided_tile,
    ),
    "a row's end is not masked": Fault(
        "head_tile",
        ("head_tile.cuh", "if (i < count) to[i] = values[i]", "to[i] = values[i]"),
        of_rows_with_a_margin,
    ),
    "a block reads before the others of its cluster have written": Fault(
        "head_tile",
        (
            "head_tile.cu",
            "    __cluster_barrier_arrive();\n    __cluster_barrier_wait();\n",
            "    __syncthreads();\n",
        ),
        of_rows_in_a_cluster,
    ),
    "a block writes before the others of its cluster have begun": Fault(
        "head_tile",
        ("head_tile.cu", "__cluster_barrier_wait();  // all blocks have begun", ""),
        of_rows_in_a_cluster,
    ),
    "threads without a token leave before a barrier": Fault(
        "kl_penalty",
        (
            "kl_penalty.cu",
            "found = reduce_block(found);",
            "if (tokens.bounds[response] + threadIdx.x >= end) return;\n"
            "    found = reduce_block(found);",
        ),
        lambda: test_kl_penalty.test_values_and_gradients("native", [5], "k3", False),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    library = EmulatedLibrary(build(tmp_path / "faulty", fault.source, [fault.change]))
    found = []
    for order in ORDERS:
        with library.used(order):
            try:
                fault.case()
            except (AssertionError, RuntimeError) as error:
                found.append(error)
    assert library.calls
    assert found, name


def runtime(name: str) -> str:
    """The path of a compiler's library, e.g. of a sanitizer's runtime."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_kernels_stay_inside_their_arrays(tmp_path: Path) -> None:
    """A process with the sanitizers, whose runtimes have to be loaded before everything else."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(runtime, libraries)),
        # detect_leaks needs ptrace, which containers often forbid
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    empty = subprocess.run([sys.executable, "-c", ""], env=environment, check=False)
    if empty.returncode != 0:
        pytest.skip("needs the sanitizers' runtime")
    environment[BUILT] = str(build(tmp_path / "sanitized", flags=SANITIZERS))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    chosen = "forward and (strided or contiguous or banned or extreme or hand or ten_thousand)"
    done = subprocess.run(
        [*command, "-k", chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20, done.stdout
