"""The tests' folders are named as the package's, and a bare `pytest` collects every test file."""

import ast
import json
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# Folders that test several packages together, or no package.
OTHERS = {"benchmarks", "faults", "fuzz", "gpu", "repo", "scripts", "zoo"}


def imports_of_tests(path: Path) -> set[str]:
    """Modules of `tests` that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / node.module.replace(".", "/")).is_dir()
            }
    return {name for name in found if name.startswith("tests.")}


def test_every_folder_of_tests_is_named_as_a_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path()}
    strange = {
        str(folder)
        for folder in folders
        if folder.parts[0] not in OTHERS and not (ROOT / "fastalign" / folder).is_dir()
    }
    assert strange == set()


def test_imports_of_tests_lead_to_files() -> None:
    """`tests.small_runs` and `tests.rank_processes` were `tests.runs` and `tests.ranks`."""
    missing = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*TESTS.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
        for name in imports_of_tests(path)
        if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
        and not (ROOT / name.replace(".", "/")).is_dir()
    }
    assert missing == set()


def test_a_bare_pytest_collects_every_test() -> None:
    """What `--quick` leaves out is chosen by its own flag, never by a setting."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pytest"
    ]
    assert settings["testpaths"] == ["tests"]
    assert settings["addopts"] == ["--import-mode=importlib"]
    assert not settings.keys() & {"norecursedirs", "python_files", "python_functions"}
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not names & {"pytest_ignore_collect", "pytest_collect_file"}, path
        assert path.name.startswith("test_") or not any(n.startswith("test_") for n in names), path
        assert "collect_ignore" not in {getattr(node, "id", "") for node in ast.walk(tree)}, path


def test_continuous_integration_runs_every_test() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1].endswith('/../scripts/test.sh"')


def test_durations_are_those_of_files_that_there_are() -> None:
    names = json.loads((TESTS / "durations.json").read_text())
    assert [name for name in names if not (TESTS / name).is_file()] == []
