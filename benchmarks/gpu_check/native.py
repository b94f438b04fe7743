"""Build the CUDA library for this GPU alone, unless one that loads is here already."""

import os
import subprocess
import sys

import torch

from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.gpu_check.runner import ROOT
from fastalign.ops import native_library

REASON = "from fastalign.ops import native_library as n; print(n.unusable_reason('cuda') or '')"


def unusable_reason() -> str:
    """Return why the library cannot be used, as a new process sees it; empty if it can."""
    command = [sys.executable, "-c", REASON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Build if need be; exit with an error if there is no library then."""
    arguments = make_parser("native", __doc__).parse_args()
    reason, built = unusable_reason(), False
    if reason:
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        environment = os.environ | {"FASTALIGN_CUDA_ARCHITECTURES": capability}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        reason, built = unusable_reason(), True
    path = str(native_library.library_path("cuda"))
    Rows(arguments.json).add({"library": path, "built": built, "unusable": reason})
    if reason:
        raise SystemExit(reason)


if __name__ == "__main__":
    main()
