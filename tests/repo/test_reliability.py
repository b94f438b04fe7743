"""The fault table in the docs is that of the tests."""

from pathlib import Path

from tests.faults.__main__ import SURVIVED
from tests.faults.table import BEGIN, END, as_markdown, declared

DOCUMENT = Path(__file__).parents[2] / "docs/reliability.md"


def test_the_documents_rows_are_those_that_the_tests_declare() -> None:
    rows = declared()
    assert len(set(rows)) == len(rows) > 25
    assert len({row.fault for row in rows}) == len(rows)
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == as_markdown(rows, dict.fromkeys(rows, SURVIVED))


def test_a_quote_that_no_run_said_is_found() -> None:
    row = next(row for row in declared() if "`" in row.does)
    assert row.unsaid("")
