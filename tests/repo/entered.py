"""Train by DPO and by PPO on tiny data and print which files of a checkout run, as JSON.

`python tests/repo/entered.py CHECKOUT FOLDER`, with CHECKOUT on PYTHONPATH; FOLDER is empty.
"""

import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def entered(call: Callable[[], object], package: Path) -> set[CodeType]:
    """Return the functions below `package` that a call enters, in all threads."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    # Module and class bodies run at an import, whoever triggers it.
    return {
        code
        for code in seen
        if code.co_filename.startswith(f"{package}/")
        and code.co_flags & inspect.CO_OPTIMIZED
        and not code.co_name.startswith("<")
    }


def entered_by_training(algorithm: str, runs: Any, checkout: Path, folder: Path) -> dict[str, Any]:
    """Return the lines of each file that two steps of training enter, and the number of functions.

    `runs` is the module with the tiny configurations, which has filled `folder`.
    """
    config = getattr(runs, f"{algorithm}_config")(folder, algorithm, max_steps=2)
    train = getattr(importlib.import_module("fastalign.trainers"), f"train_{algorithm}")
    codes = entered(lambda: train(config), checkout / "fastalign")
    files = {Path(code.co_filename) for code in codes}
    lines = {str(p.relative_to(checkout)): len(p.read_text().splitlines()) for p in files}
    return {"functions": len(codes), "lines": dict(sorted(lines.items()))}


def main(checkout: Path, folder: Path) -> None:
    """Print what `entered_by_training` returns, for DPO and PPO."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    name = "small_runs" if (checkout / "tests/small_runs.py").is_file() else "runs"
    runs = importlib.import_module(f"tests.{name}")
    runs.fill(folder)
    algorithms = ("dpo", "ppo")
    result = {name: entered_by_training(name, runs, checkout, folder) for name in algorithms}
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
