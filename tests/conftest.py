"""Read before any test module: Triton kernels run interpreted, unless a GPU is asked for.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process runs either the interpreter
or a GPU: `FASTALIGN_TEST_GPU=1 pytest tests/gpu` is the second.
"""

import gc
import os
from pathlib import Path

import pytest

if os.environ.get("FASTALIGN_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Whose files take minutes: they come first, so that at the end no process works on one alone.
HERE = Path(__file__).parent
LONG = {"faults", "ranks", "rollouts", "runs", "trainers"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.relative_to(HERE).parts[0] not in LONG)


def pytest_collection_finish() -> None:
    """A run's collections of garbage need not look at all modules and tests again."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """An engine of vLLM thaws them when it is closed."""
    file_ends = nextitem is not None and nextitem.path != item.path  # counting takes a while
    if file_ends and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count what is left behind at the end
