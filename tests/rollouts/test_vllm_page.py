"""The Python of docs/vllm.md runs, each block in an interpreter of its own, as a reader runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollouts.vllm_cases import needs_vllm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@needs_vllm
@pytest.mark.parametrize("code", BLOCKS, ids=["in-process", "server"])
def test_python_on_the_page_of_vllm_runs(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
