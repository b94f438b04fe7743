"""The report's section on comparisons by people."""

import re
from pathlib import Path

import pytest

from fastalign.cli.main import main
from fastalign.compare.store import NewPair, Store
from tests.compare.site import ATTACK, vote_of


def make_comparisons(folder: Path) -> Path:
    store = Store(folder / "people.db", create=True)
    store.add_pairs([NewPair(f"Q{n}", f"x{n}", f"yy{n}", "f", "dpo", "sft") for n in range(8)])
    for pair in range(1, 9):
        vote_of(store, pair, "anna", "a" if pair < 7 else "tie")
        vote_of(store, pair, ATTACK, "a" if pair < 6 else "b")
    for number, accuracy in ((50, 0.6), (100, 0.7)):
        interval = {"accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
        store.add_fit(
            {"num_labels": number, "accuracy": accuracy, "accuracy_count": 30, **interval}
        )
    store.close()
    return store.path


def test_agreement_biases_curve_and_win_rate_are_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = make_comparisons(tmp_path), tmp_path / "report.html"
    assert main(["report", str(path), "--out", str(out)]) == 0
    page = out.read_text()
    win_rate = "dpo against sft: win rate 0.750"
    for text in (page, capsys.readouterr().out):
        assert win_rate in text
        assert "Krippendorff" in text
        assert "70% (60% to 80% of 30)" in text  # the last fit
    assert len(re.findall('<figure class="picture">', page)) == 1
    assert len(re.findall('data-tip="[^"]* labels, right on', page)) == 2
    assert page.count("<script>") == 1  # the tips alone
    assert "Settings" not in page


def test_a_database_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.db").write_text("text")
    out = str(tmp_path / "report.html")
    assert main(["report", str(tmp_path / "x.db"), "--out", out]) == 2
    assert "x.db: expected a database of comparisons" in capsys.readouterr().err
