"""Imports go one way; heavy libraries are imported in the one file that needs each."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.structure import ROOT, Checkout

# library: the folders and files that may import it
HEAVY = {
    "datasets": {"data"},
    "wandb": {"report/trackers.py"},
    "mlflow": {"report/trackers.py"},
    "trackio": {"report/trackers.py"},
    "matplotlib": {"report"},
    "jinja2": {"page_templates.py", "data/tokenizer.py"},
    "starlette": {"compare/app.py", "compare/chat_app.py", "report/watch.py"},
    "uvicorn": {"cli/compare/serve.py"},
    "markdown_it": {"compare/page.py"},
    "krippendorff": {"compare/agreement.py"},
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


@functools.cache
def imported() -> dict[str, set[str]]:
    """The packages that each module imports, by its path in the package."""
    return {
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
        for path, roots in imported().items()
        if library in roots and not any(lies_in(path, place) for place in HEAVY[library])
    ]
    assert strangers == []


@pytest.mark.parametrize("layer", ["ops", "losses", "fused", "batch/packed.py"])
def test_operations_and_losses_import_nothing_heavier_than_torch(layer: str) -> None:
    found = [roots for path, roots in imported().items() if lies_in(path, layer)]
    third_party = set().union(*found) - set(sys.stdlib_module_names) - {"fastalign"}
    assert found
    assert third_party <= {"torch", "triton"}


# In one process, since each start takes a second: what has been imported after each stage.
STAGES = """
import contextlib, io, sys

def without(stage, *libraries):
    found = [name for name in libraries if name in sys.modules]
    assert not found, f"{stage} imports {found}"

import fastalign
from fastalign.cli.main import ALGORITHMS, COMMANDS, main

with contextlib.redirect_stdout(io.StringIO()):
    assert main(["--help"]) == 0
    assert main(["nothing"]) == 2
without("fastalign --help", "torch", "numpy", "tyro", "yaml")

def print_help(*command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        assert main([*command, "--help"]) == 0
    assert "usage: fastalign " in out.getvalue()

heavy = "torch._dynamo", "transformers", "datasets", "triton", "sympy", "tensorboard", "matplotlib"
# A loss's parameters are those of its function, whose module imports torch.
of_functions = [name for name in ALGORITHMS if ALGORITHMS[name].choices]
light = [(name,) for name in COMMANDS if name not in of_functions]
for command in (*light, ("data", "check"), ("estimate", "sft")):
    print_help(*command)
    without(f"fastalign {command} --help", *heavy, "torch", "numpy", "pyarrow", "jinja2")
training = {n for n in fastalign.__all__ if n.startswith("train_") or n.endswith("_run")}
assert len(training) == 12
for name in set(fastalign.__all__) - training:
    getattr(fastalign, name)
assert fastalign.ops.token_logprob is fastalign.token_logprob
assert not hasattr(fastalign, "nothing")
for name in of_functions:
    print_help(name)
without("import fastalign, and --help of what has losses,", *heavy)
try:
    main(["dpo", "--los", "dpo"])
except SystemExit:
    pass
without("a command line that is wrong", *heavy)
"""


def test_a_start_imports_only_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
