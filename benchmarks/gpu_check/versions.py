"""Print the versions of everything whose interface the kernels and trainers depend on."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Sequence

import torch

from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.gpu_check.stages import tool
from benchmarks.measure import device_name
from fastalign.ops.backends import unusable_reason

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "datasets", "trl", "liger-kernel"),
    *("cut-cross-entropy", "flash-attn", "tyro", "vllm", "bitsandbytes", "peft"),
    *("pytest", "pytest-timeout", "pytest-xdist"),
)


def version_of(package: str) -> str | None:
    """Return an installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said_by(words: Sequence[str | None]) -> str | None:
    """Return the last line of a program's output; None where the program is not there."""
    program, *arguments = words
    if program is None:
        return None
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def main() -> None:
    """Print and write the versions, and why each backend cannot run."""
    arguments = make_parser("versions", __doc__).parse_args()
    device, rows = arguments.device, Rows(arguments.json)
    query = ("--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader")
    rows.add(
        {
            "python": platform.python_version(),
            "device": device_name(device),
            "cuda": torch.version.cuda,
            "driver": said_by([shutil.which("nvidia-smi"), *query]),
            "nvcc": said_by([tool("nvcc"), "--version"]),
            **{name: version_of(name) for name in PACKAGES},
        }
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows.add(
            {
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": properties.L2_cache_size,
            }
        )
    for backend in ("native", "triton", "epilogue"):
        reason = unusable_reason(backend, device, torch.float32)
        rows.add({"backend": backend, "unusable": reason})
    if importlib.util.find_spec("transformers") is None:
        return
    from fastalign.models.attention.choice import ATTENTIONS, attention_reason

    for name in ATTENTIONS:
        reason = attention_reason(name, torch.device(device), torch.bfloat16)
        rows.add({"attention": name, "unusable": reason})


if __name__ == "__main__":
    main()
