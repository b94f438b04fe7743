"""Say whether the CUDA library is here and runs on this GPU.

It is built before the stages: that takes minutes, and a stage has nine for all its steps.
"""

from benchmarks.gpu_check.rows import Rows, make_parser
from fastalign.ops import native_library

ARCHITECTURE = "90"
BUILD = f"FASTALIGN_CUDA_ARCHITECTURES={ARCHITECTURE} python setup.py build_ext --inplace"


def main() -> None:
    """Exit with an error of one line if the library cannot be used."""
    arguments = make_parser("native", __doc__).parse_args()
    path = native_library.library_path("cuda")
    reason = native_library.unusable_reason("cuda")
    Rows(arguments.json).add({"library": str(path), "unusable": reason or ""})
    if not path.is_file():
        raise SystemExit(f"no CUDA library; carry it, or build it first: {BUILD}")
    if reason:
        raise SystemExit(reason)


if __name__ == "__main__":
    main()
