"""docs/losses.md is what the code makes, and leaves out no loss and no option."""

import ast
import re
from dataclasses import fields

import pytest

from fastalign import losses
from tests.losses.catalogue import (
    CHOICES,
    DOCS,
    SECTIONS,
    Entry,
    equation,
    page,
)
from tests.repo.structure import ROOT

ENTRIES = [entry for _, entries in SECTIONS.values() for entry in entries]


def test_the_page_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), "run python -m tests.losses"


def test_every_choice_and_option_has_a_row() -> None:
    rows = {entry.flag for entry in ENTRIES}
    choices = {f"{flag} {name}" for flag, table in CHOICES.items() for name in table}
    assert choices - rows == set()
    text = page()
    for flag, table in CHOICES.items():
        for kind in table.values():
            for each in fields(kind):
                name = f"{flag}.{each.name.replace('_', '-')}"
                assert f"`{name}`" in text, name


@pytest.mark.parametrize("test", sorted({entry.test for entry in ENTRIES}))
def test_each_named_test_is_there(test: str) -> None:
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_paper_is_the_functions(entry: Entry) -> None:
    _, source = equation(entry.equation)
    function = getattr(losses, entry.equation.strip("`").partition("`")[0], None)
    papers = re.findall(r"\d{4}\.\d{5}", source)
    if function is not None and papers:
        doc = function.__doc__ or ""
        assert papers[0] in doc or papers[0] in doc.replace("\n    ", " ") or "same" in source
    assert entry.use
    assert entry.peers
