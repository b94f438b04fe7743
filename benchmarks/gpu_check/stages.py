"""The steps of the three stages, in the order of what they decide.

Stage 1: are the kernels right, and does the design's interface to the products hold? Stage 2: the
head's speed. Stage 3: attention, whole training steps, and a model shared by NCCL.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence

from benchmarks.gpu_check.runner import Step

TOOLKIT = "/usr/local/cuda/bin"
HEAD_TESTS = (
    "tests/gpu/test_heads_gpu.py",
    "tests/gpu/test_head_tile_split_gpu.py",
    "tests/gpu/test_kl_gpu.py",
    "tests/gpu/test_packed_gpu.py",
    "tests/gpu/test_preference_loss_gpu.py",
    "tests/gpu/test_token_logprob_gpu.py",
)
CASE = "llama-3-8b"


def tool(name: str) -> str | None:
    """Return the path of one of the CUDA toolkit's programs, or None."""
    return shutil.which(name) or shutil.which(name, path=TOOLKIT)


def without_tool(name: str) -> Callable[[], str | None]:
    """Return a function that says whether a program is missing."""
    return lambda: None if tool(name) else f"{name} is not installed"


def without_packages(*names: str) -> Callable[[], str | None]:
    """Return a function that says which packages are missing."""

    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    return missing


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module."""
    return (sys.executable, "-m", module, *arguments)


def own(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a measurement in this folder, which writes its figures."""
    return python(f"benchmarks.gpu_check.{module}", *arguments, "--json", "{rows}")


def compare(*arguments: str) -> tuple[str, ...]:
    """Return the command of a comparison, which writes its figures."""
    return python(
        "benchmarks.compare", *arguments, "--device", "cuda", "--json", "{rows}", "--overwrite"
    )


def tests(*arguments: str) -> tuple[str, ...]:
    """Return the command of tests in eight processes."""
    return own("shards", *arguments)


def sanitized(which: str, seconds: float) -> Step:
    """Return the step that runs every kernel on small shapes under one of the sanitizer's tools."""
    program = tool("compute-sanitizer") or "compute-sanitizer"
    options = (f"--tool={which}", "--error-exitcode=1", "--print-limit=20")
    command = (program, *options, *python("benchmarks.gpu_check.small_launches"))
    return Step(which, command, seconds, 180, without_tool("compute-sanitizer"))


DPO_STEP = (
    *("dpo-step", "--model", "llama-3.2-1b", "--case", "long-prompts", "--rounds=3"),
    *("--peer", "trl", "--peer", "careful eager"),
)
NATIVE = Step("native", own("native"), 10, 60)
STEPS: dict[int, Sequence[Step]] = {
    1: (
        NATIVE,
        Step("versions", own("versions"), 15, 60),
        Step("products", own("products"), 25, 90),
        sanitized("memcheck", 60),
        sanitized("racecheck", 60),
        Step("kernel-tests", tests(*HEAD_TESTS), 210, 400, without_packages("pytest")),
        Step("operations", compare("operations"), 80, 180),
        Step("tune", python("benchmarks.tune", "--table", "{rows}"), 70, 180),
    ),
    2: (
        NATIVE,
        Step("head-paths", own("head_paths", "--case", CASE), 90, 200),
        Step("tune-epilogue", python("benchmarks.tune", "--product", "--table", "{rows}"), 20, 90),
        Step("head-peers", compare("head", "--case", CASE, "--tested", "--rounds=3"), 110, 240),
        Step("profile", own("one_call", "--profile"), 50, 120),
        Step(
            "ncu",
            (
                tool("ncu") or "ncu",
                "--set=full",
                "--kernel-name=regex:head_tile|kl_tile",
                "--launch-count=4",
                "--csv",
                "--page=details",
                *python("benchmarks.gpu_check.one_call"),
            ),
            60,
            150,
            without_tool("ncu"),
        ),
        Step(
            "odd-vocabulary", own("head_paths", "--case", CASE, "--vocabulary", "128257"), 90, 200
        ),
        Step("long-batch", own("head_paths", "--case", CASE, "--tokens", "8192"), 110, 240),
    ),
    3: (
        NATIVE,
        Step(
            "attention-tests",
            tests("tests/gpu/test_attention_gpu.py"),
            110,
            240,
            without_packages("pytest"),
        ),
        Step("attention", own("attention"), 110, 240),
        Step(
            "dpo-step",
            compare(*DPO_STEP),
            180,
            300,
            without_packages("transformers", "tensorboard"),
        ),
        Step(
            "synchronisations",
            own("synchronisations"),
            50,
            150,
            without_packages("transformers", "tensorboard"),
        ),
        Step(
            "fsdp",
            tests("tests/gpu/test_ranks_gpu.py", "-k", "fsdp"),
            75,
            200,
            without_packages("pytest", "transformers", "tensorboard", "tyro"),
        ),
    ),
}
