"""Imports go one way; heavy libraries are imported in the one file that needs each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.structure import ROOT, Checkout

# library: the folders and files that may import it
HEAVY = {
    "datasets": {"data"},
    "tensorboard": {"runs"},
    "matplotlib": {"report"},
    "jinja2": {"report", "data/tokenizer.py"},
    "tyro": {"cli"},
    "httpx2": {"rollouts/engines/connection.py"},
    "openai": {"evaluation/judge/chat_endpoint.py"},
    "anyio": {"rollouts/engines/connection.py"},
    "vllm": {"rollouts/engines/library.py"},
    "peft": {"models/lora.py", "models/lora_files.py"},
    "bitsandbytes": {"models/low_bit.py", "runs/state.py"},
    "transformers": {"models", "ranks/parallel.py", "data/tokenizer.py", "rollouts", "trl", "cli"},
    "trl": {"trl"},
}


MODULES = {
    module.path.removeprefix("fastalign/"): {
        root
        for node in ast.walk(module.tree)
        for root in (
            [alias.name.split(".")[0] for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module.split(".")[0]]
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
            else []
        )
    }
    for module in Checkout().modules.values()
}


def lies_in(path: str, place: str) -> bool:
    return path == place or path.startswith(place + "/")


def test_import_linter_finds_no_broken_contract() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_heavy_library_is_imported_only_where_it_is_needed(library: str) -> None:
    strangers = [
        path
        for path, roots in MODULES.items()
        if library in roots and not any(lies_in(path, place) for place in HEAVY[library])
    ]
    assert strangers == []


@pytest.mark.parametrize("layer", ["ops", "losses", "fused", "batch/packed.py"])
def test_operations_and_losses_import_nothing_heavier_than_torch(layer: str) -> None:
    found = [roots for path, roots in MODULES.items() if lies_in(path, layer)]
    third_party = set().union(*found) - set(sys.stdlib_module_names) - {"fastalign"}
    assert found
    assert third_party <= {"torch", "triton"}


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, fastalign; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
