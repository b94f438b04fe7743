"""Files, folders and functions stay small, and everything has one place.

`python -m tests.repo` prints the same measures, of any checkout. A limit is changed here, with the
reason.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import small_runs
from tests.repo import structure
from tests.repo.__main__ import PARTS
from tests.repo.entered import entered_by_training
from tests.repo.structure import ROOT, Checkout

CHECKOUT = Checkout()
# Kept apart on purpose: module -> reason.
SEPARATE = {
    "fastalign/ops/gae/op.py": "registers the operation; every operation has the same files",
}
RULES = {
    structure.large_folders: "at most 15 modules a folder",
    structure.many_parameters: "at most 8 parameters a function (kernels, operations and the "
    "drop-ins excepted)",
    structure.long_functions: "at most 50 lines of code a function",
    structure.long_modules: "at most 600 lines a module",
    structure.small_modules: "a module under 60 lines that one neighbour imports is merged into it",
    structure.algorithm_tables: "one table of algorithms: fastalign/cli/algorithms.py",
    structure.poor_openings: "a docstring says what a thing is or does; it does not begin with "
    "What, Of, Whether, How, Nothing, By or That (functions: ruff's D401)",
    structure.not_imperative: "ruff's D401",
}


@pytest.mark.parametrize("measure", RULES, ids=lambda measure: measure.__name__)
def test_the_structure_keeps_its_rules(measure: Callable[[Checkout], dict[str, int]]) -> None:
    found = {name: n for name, n in measure(CHECKOUT).items() if name not in SEPARATE}
    assert found == {}, RULES[measure]


def test_modules_that_stay_apart_would_else_be_merged() -> None:
    assert SEPARATE.keys() <= structure.small_modules(CHECKOUT).keys()


@pytest.mark.parametrize(("algorithm", "most"), [("dpo", 14), ("ppo", 18)])
def test_a_run_enters_few_files(
    algorithm: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_runs.fill(tmp_path)
    found = entered_by_training(algorithm, small_runs, ROOT, tmp_path)["lines"]
    assert len([path for path in found if path.startswith(PARTS)]) == most


def test_native_sources_stay_within_the_budget() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in sources}
    assert {name: n for name, n in lengths.items() if n > 350} == {}


BAD = {
    structure.many_parameters: "def f(a, b, c, d, e, f, g, h, *, i): ...",
    structure.long_functions: "def f():\n" + "    x = 1\n" * 51,
    structure.long_modules: "x = 1\n" * 601,
    structure.algorithm_tables: "TABLE = {'sft': 1, 'dpo': 2, 'ppo': 3}",
    structure.poor_openings: '"""What a module is."""',
    structure.not_imperative: '"""A module."""\n\ndef f():\n    """Returns nothing."""\n',
}
GOOD = {
    structure.many_parameters: "class A:\n    def f(self, a, b, c, d, e, f, g, h): ...",
    structure.long_functions: 'def f():\n    """A\n' + "\n" * 60 + '    """\n' + "    x = 1\n" * 50,
    structure.long_modules: "x = 1\n" * 600,
    structure.algorithm_tables: "TABLE = {'sft': 1, 'dpo': 2}",
    structure.poor_openings: '"""Whatever."""',
    structure.not_imperative: '"""A module."""\n\ndef f():\n    """Return nothing."""\n',
}


@pytest.mark.parametrize("measure", BAD, ids=lambda measure: measure.__name__)
def test_a_measure_finds_what_it_looks_for(
    measure: Callable[[Checkout], dict[str, int]], tmp_path: Path
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "fastalign").mkdir()
    module = tmp_path / "fastalign/module.py"
    module.write_text(BAD[measure])
    assert len(measure(Checkout(tmp_path))) == 1
    module.write_text(GOOD[measure])
    assert measure(Checkout(tmp_path)) == {}


def test_folders_and_small_modules_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "fastalign/part"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from fastalign.part.m2 import b")
    for number in range(16):
        (folder / f"m{number}.py").write_text("")
    (folder / "m0.py").write_text("from fastalign.part.m1 import a\nfrom fastalign.part import b")
    (folder / "m3.py").write_text("from fastalign.part import m4\nx = 1\n" * 40)
    (folder / "m4.py").write_text("x = 1\n" * 60)
    checkout = Checkout(tmp_path)
    assert structure.large_folders(checkout) == {"fastalign/part": 16}
    # m2 is public by the package, m4 is long enough.
    assert structure.small_modules(checkout) == {"fastalign/part/m1.py": 0}
    assert checkout.imports["fastalign.part.m0"] == {"fastalign.part.m1", "fastalign.part.m2"}
