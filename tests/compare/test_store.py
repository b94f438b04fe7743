"""The database: only added to, written before it is confirmed, readable by its owner alone."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign.compare.store import NewPair, NewVote, Store
from tests.compare.site import new_pairs, new_store, vote_of


def test_pairs_come_back_as_they_were_added_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    turns = [{"role": "user", "content": "Why?\u2028\U0001f600"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("So.", "")]
    pair = NewPair(turns, *answers, "x.jsonl", "runs/a", "runs/b")
    swapped = NewPair(turns, *reversed(answers), "x.jsonl", "runs/b", "runs/a")
    assert store.add_pairs([pair, swapped, *new_pairs(4)]) == 1
    found = store.pairs()[-1]
    assert (found.prompt, found.response_a, found.response_b) == (turns, *answers)
    assert (found.model_a, found.model_b, found.identical) == ("runs/a", "runs/b", False)


def test_a_vote_is_one_however_often_its_form_is_sent(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    vote = NewVote(1, store.annotator("anna").id, "b", "tie", "random", "n1", 1, "why", 2.5)
    stored = store.add_vote(vote)
    assert stored is not None
    assert store.add_vote(vote) is None
    (found,) = store.votes()
    assert (found.verdict, found.shown_left, found.note, found.seconds) == ("tie", "b", "why", 2.5)
    assert found.time.endswith("+00:00")


def test_votes_are_never_changed_or_removed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    vote_of(store, 1, "anna", "a")
    store.undo(store.votes()[0])
    assert store.votes() == []
    assert store.num_rows() == 2
    with sqlite3.connect(store.path) as other:
        for statement in ("UPDATE votes SET verdict = 'b'", "DELETE FROM votes"):
            with pytest.raises(sqlite3.IntegrityError, match="votes are only added"):
                other.execute(statement)
    other.close()


def test_a_vote_is_undone_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    vote_of(store, 1, "anna", "a")
    vote = store.votes()[0]
    store.undo(vote)
    store.undo(vote)
    assert store.num_rows() == 2


def test_keys_stay_and_are_not_guessed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    anna, ben = store.annotator("anna"), store.annotator("ben")
    assert store.annotator("anna") == anna
    assert anna.key != ben.key
    assert len(str(anna.key)) >= 43  # 256 bits
    imported = store.annotator("file", with_key=False)
    assert imported.key is None
    assert store.annotator("file").key is not None


def test_the_file_is_its_owner_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = new_store(tmp_path)
    finally:
        os.umask(before)
    vote_of(store, 1, "anna", "a")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes) >= {"comparisons.db", "comparisons.db-wal"}
    assert set(modes.values()) == {0o600}
    store.path.chmod(0o644)  # copied from elsewhere
    with store.only_writer():
        assert store.path.stat().st_mode & 0o777 == 0o600


def test_one_process_writes(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    other = Store(store.path).only_writer()
    with store.only_writer(), pytest.raises(ValueError, match="another process serves it"):
        other.__enter__()
    with store.only_writer():
        pass


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt,answer\n" * 99, "expected a database of comparisons"),
        (None, "an SQLite database of something else"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "other.db"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE t (x)")
        other.close()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        Store(path)
    with pytest.raises(FileNotFoundError, match="fastalign compare FILE"):
        Store(tmp_path / "missing.db")


KILLED = """
import os, sys
from fastalign.compare.store import NewVote, Store
store = Store(sys.argv[1])
who = store.annotator("anna").id
for number in range(1, 100):
    assert store.add_vote(NewVote(number, who, "a", "a", "random", str(number)))
    print(number, flush=True)
"""


def test_a_killed_process_loses_no_vote_that_it_confirmed(tmp_path: Path) -> None:
    store = new_store(tmp_path, 99)
    store.close()
    code = [sys.executable, "-c", KILLED, str(store.path)]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "20\n":
                process.send_signal(signal.SIGKILL)
                break
        confirmed = 20 + len(process.stdout.read().split())
    assert process.returncode == -signal.SIGKILL
    votes = Store(store.path).votes()
    assert confirmed <= len(votes) <= confirmed + 1
    assert [vote.pair for vote in votes] == list(range(1, len(votes) + 1))
