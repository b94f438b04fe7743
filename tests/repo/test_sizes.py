"""Files and functions stay small. To pass a budget, split; or change it here and say why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 50
SOURCES = sorted((ROOT / "fastalign").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of each function's body: a kernel's arguments take a line each."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name: (node.end_lineno or node.lineno)
        - node.body[0].lineno
        + 1
        - docstring_lines(node)
        for node in ast.walk(tree)
        if isinstance(node, functions)
    }


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A long docstring is no fault: the budget is for code."""
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_stay_within_the_budget(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines; the budget is {MAX_FILE_LINES}"
    too_long = {k: v for k, v in function_lengths(path).items() if v > MAX_FUNCTION_LINES}
    assert not too_long, f"functions over {MAX_FUNCTION_LINES} lines: {too_long}"


def test_native_sources_stay_within_the_budget() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in sources}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
