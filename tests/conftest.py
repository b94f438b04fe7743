"""Read before any test module: Triton kernels run interpreted, unless a GPU is asked for.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process runs either the interpreter
or a GPU: `FASTALIGN_TEST_GPU=1 pytest tests/gpu` is the second.
"""

import os

if os.environ.get("FASTALIGN_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
