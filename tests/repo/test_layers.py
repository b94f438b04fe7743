"""Imports go one way; heavy libraries are imported in the one file that needs each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastalign"
# library: the places that may import it
HEAVY = {
    "datasets": {"data"},
    "tensorboard": {"runs"},
    "matplotlib": {"report"},
    "jinja2": {"report", "data/tokenizer.py"},
    "tyro": {"cli"},
    "httpx2": {"evaluation/judge/chat_endpoint.py", "rollouts/engines/connection.py"},
    "anyio": {"rollouts/engines/connection.py"},
    "vllm": {"rollouts/engines/library.py"},
    "peft": {"models/lora.py", "models/lora_files.py"},
    "bitsandbytes": {"models/low_bit.py", "runs/optimizer.py"},
    "transformers": {"models", "ranks/layers.py", "data/tokenizer.py", "rollouts", "cli"},
}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def test_import_linter_finds_no_broken_contract() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_heavy_library_is_imported_only_where_it_is_needed(library: str) -> None:
    allowed = HEAVY[library]
    strangers = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).as_posix()
        if library in imported_roots(path) and not any(
            relative == place or relative.startswith(place + "/") for place in allowed
        ):
            strangers.append(relative)
    assert strangers == []


@pytest.mark.parametrize("layer", ["ops", "losses", "fused", "batch/packed.py"])
def test_operations_and_losses_import_nothing_heavier_than_torch(layer: str) -> None:
    place = PACKAGE / layer
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    roots = set().union(*(imported_roots(path) for path in paths))
    third_party = roots - set(sys.stdlib_module_names) - {"fastalign"}
    assert third_party <= {"torch", "triton"}


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, fastalign; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
