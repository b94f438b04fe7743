"""Where no GPU is asked for, these modules are imported, and skipped without making their tests.

They are a thousand, which every process of the suite would make, and skip one by one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest


class Unused(pytest.Module):
    """A module whose imports and parameters are found to be sound, and no more."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        assert self.obj is not None
        pytest.skip("needs FASTALIGN_TEST_GPU=1, and a GPU (scripts/gpu_check.sh)")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if os.environ.get("FASTALIGN_TEST_GPU") == "1":
        return None
    return Unused.from_parent(parent, path=module_path)
