"""The database of comparisons: pairs of answers, annotators, and a table of votes that only grows.

It is one SQLite file in WAL mode that its owner alone can read. A vote is written to the disk
before the page says so. Undoing one writes a row that names it; no row of votes is ever changed.
"""

import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "tie", "both_bad", "skip"]
ChosenBy = Literal["random", "model", "repeat", "import", "chat"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
APPLICATION_ID = 0x66_61_63_6D  # "facm", in the file's header
FORMAT = 1
SCHEMA = """
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    key TEXT UNIQUE
) STRICT;
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY,
    prompt TEXT NOT NULL,
    response_a TEXT NOT NULL,
    response_b TEXT NOT NULL,
    source TEXT NOT NULL,
    model_a TEXT,
    model_b TEXT,
    digest TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE votes (
    id INTEGER PRIMARY KEY,
    pair INTEGER NOT NULL REFERENCES pairs (id),
    annotator INTEGER NOT NULL REFERENCES annotators (id),
    shown_left TEXT NOT NULL CHECK (shown_left IN ('a', 'b')),
    verdict TEXT NOT NULL CHECK (verdict IN ('a', 'b', 'tie', 'both_bad', 'skip', 'undo')),
    strength INTEGER NOT NULL CHECK (strength IN (1, 2)),
    note TEXT NOT NULL,
    seconds REAL NOT NULL,
    time TEXT NOT NULL,
    chosen_by TEXT NOT NULL CHECK (chosen_by IN ('random', 'model', 'repeat', 'import', 'chat')),
    nonce TEXT NOT NULL UNIQUE,
    undoes INTEGER UNIQUE REFERENCES votes (id)
) STRICT;
CREATE TABLE fits (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    measures TEXT NOT NULL
) STRICT;
CREATE TRIGGER votes_are_not_changed BEFORE UPDATE ON votes
BEGIN SELECT RAISE(ABORT, 'votes are only added'); END;
CREATE TRIGGER votes_are_not_removed BEFORE DELETE ON votes
BEGIN SELECT RAISE(ABORT, 'votes are only added'); END;
"""


@dataclass(frozen=True)
class NewPair:
    """A pair of answers that is to be compared.

    Attributes:
        prompt: plain text, or a list of {role, content}.
        response_a: an answer, of the prompt's kind.
        response_b: the other answer; equal to the first one in a comparison of two models alone.
        source: where it comes from, such as `samples.jsonl`.
        model_a: model that gave the first answer, in a comparison of two models.
        model_b: model that gave the second.
    """

    prompt: Any
    response_a: Any
    response_b: Any
    source: str
    model_a: str | None = None
    model_b: str | None = None

    @property
    def digest(self) -> str:
        """A hash that is the same for the same answers in the other order, by the same models."""
        sides = [(self.model_a, self.response_a), (self.model_b, self.response_b)]
        parts = sorted(json.dumps(side, ensure_ascii=False, sort_keys=True) for side in sides)
        text = json.dumps([self.prompt, *parts], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Pair(NewPair):
    """A pair in the database; attributes are as in `NewPair`."""

    id: int = 0

    @property
    def identical(self) -> bool:
        """True if both answers are the same, which nobody has to be asked about."""
        return bool(self.response_a == self.response_b)


@dataclass(frozen=True)
class Annotator:
    """A person who compares, or the votes of an imported file (without a key)."""

    id: int
    name: str
    key: str | None


@dataclass(frozen=True)
class NewVote:
    """A verdict on a pair.

    Attributes:
        pair: id of the pair.
        annotator: id of the person.
        shown_left: the answer that stood on the left (above, on a phone).
        verdict: the better answer, `tie`, `both_bad`, or `skip` for no verdict.
        chosen_by: how the pair came to be shown; `random` ones are an unbiased sample, a `repeat`
            is a pair that the same person had judged before, with the sides swapped.
        nonce: random text of the form; a form that is sent twice is one vote.
        strength: 2 if the answer is clearly better.
        note: the reason, if one was given.
        seconds: from showing the pair to the verdict.
    """

    pair: int
    annotator: int
    shown_left: Side
    verdict: Verdict
    chosen_by: ChosenBy
    nonce: str
    strength: int = 1
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Vote(NewVote):
    """A vote in the database that was not undone; attributes are as in `NewVote`.

    `time` is UTC in ISO 8601.
    """

    id: int = 0
    time: str = ""

    @property
    def decides(self) -> bool:
        """True unless the pair was skipped."""
        return self.verdict != "skip"


_VOTE = "pair, annotator, shown_left, verdict, chosen_by, nonce, strength, note, seconds, id, time"
_PAIR = "prompt, response_a, response_b, source, model_a, model_b, id"


def now() -> str:
    """Return the time in UTC, in ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store:
    """An open database.

    Args:
        path: the file.
        create: make it if it does not exist.

    Raises:
        ValueError: if the file is something else, or of another version.
        FileNotFoundError: if it does not exist and is not made.
    """

    def __init__(self, path: str | Path, *, create: bool = False):
        self.path = Path(path)
        new = not self.path.exists()
        if new and not create:
            raise FileNotFoundError(
                f"{path}: no such file; `fastalign compare FILE --out {path}` makes it"
            )
        if new:  # before SQLite opens it: its journal files take the mode of this one
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif not self.path.is_file():
            raise ValueError(f"{path}: expected a file, got a folder or a device")
        # Any thread may use it; transactions take turns.
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(
            self.path, isolation_level=None, timeout=10, check_same_thread=False
        )
        try:
            self._prepare(new or self.path.stat().st_size == 0)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: expected a database of comparisons: {error}") from None
        except ValueError:
            self._connection.close()
            raise

    def _prepare(self, new: bool) -> None:
        execute = self._connection.execute
        if new:
            self._connection.executescript(
                f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
                f"BEGIN; {SCHEMA} COMMIT;"
            )
        (kind,) = execute("PRAGMA application_id").fetchone()
        (version,) = execute("PRAGMA user_version").fetchone()
        if kind != APPLICATION_ID:
            raise ValueError(f"{self.path}: an SQLite database of something else")
        if version != FORMAT:
            raise ValueError(f"{self.path}: expected format {FORMAT}, got {version}")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")  # a vote that was confirmed survives a power cut
        execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        """Close the database; SQLite moves what its journal holds into the file."""
        self._connection.close()

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the database for this process; others may read it.

        Raises:
            ValueError: if another process holds it.
        """
        beside = self.path.with_name(f"{self.path.name}-lock")
        with beside.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.path}: another process serves it or writes to it; stop that first"
                ) from None
            self.path.chmod(0o600)
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def add_pairs(self, pairs: Iterable[NewPair]) -> int:
        """Add pairs and return how many are new; one that is there already is left alone."""
        with self._transaction():
            before = self._connection.total_changes
            self._connection.executemany(
                "INSERT OR IGNORE INTO pairs (prompt, response_a, response_b, source, model_a, "
                "model_b, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        *(_as_json(x) for x in (pair.prompt, pair.response_a, pair.response_b)),
                        pair.source,
                        pair.model_a,
                        pair.model_b,
                        pair.digest,
                    )
                    for pair in pairs
                ),
            )
            return self._connection.total_changes - before

    def pairs(self) -> list[Pair]:
        """Return all pairs in the order in which they were added."""
        rows = self._connection.execute(f"SELECT {_PAIR} FROM pairs ORDER BY id")
        return [Pair(*map(json.loads, row[:3]), *row[3:]) for row in rows]

    def ids_by_digest(self) -> dict[str, int]:
        """Return the id of each pair by its digest."""
        return dict(self._connection.execute("SELECT digest, id FROM pairs"))

    def annotator(self, name: str, *, with_key: bool = True) -> Annotator:
        """Return the annotator of this name, who is added if need be; keys stay the same."""
        key = secrets.token_urlsafe(32) if with_key else None
        with self._transaction():
            self._connection.execute(
                "INSERT INTO annotators (name, key) VALUES (?, ?) ON CONFLICT (name) DO UPDATE "
                "SET key = coalesce(key, excluded.key)",
                (name, key),
            )
        row = self._connection.execute("SELECT * FROM annotators WHERE name = ?", (name,))
        return Annotator(*row.fetchone())

    def annotators(self) -> list[Annotator]:
        """Return all annotators in the order in which they were added."""
        rows = self._connection.execute("SELECT id, name, key FROM annotators ORDER BY id")
        return [Annotator(*row) for row in rows]

    def add_votes(
        self, votes: Iterable[NewVote], *, time: str | None = None
    ) -> list["Vote | None"]:
        """Add votes in one transaction; return each as it is stored, None if its nonce was there.

        They are on the disk when this returns.
        """
        stored: list[Vote | None] = []
        with self._transaction():
            for vote in votes:
                when = time or now()
                cursor = self._connection.execute(
                    "INSERT INTO votes (pair, annotator, shown_left, verdict, chosen_by, nonce, "
                    "strength, note, seconds, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (nonce) DO NOTHING",
                    (
                        *(vote.pair, vote.annotator, vote.shown_left, vote.verdict),
                        *(vote.chosen_by, vote.nonce, vote.strength, vote.note, vote.seconds),
                        when,
                    ),
                )
                is_new = cursor.rowcount == 1 and cursor.lastrowid is not None
                kept = Vote(**vars(vote), id=cursor.lastrowid or 0, time=when)
                stored.append(kept if is_new else None)
        return stored

    def add_vote(self, vote: NewVote) -> Vote | None:
        """Add a vote and return it as it is stored; None if its nonce is there already."""
        (stored,) = self.add_votes([vote])
        return stored

    def undo(self, vote: Vote) -> None:
        """Add the row that undoes a vote; a vote is undone once."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO votes (pair, annotator, shown_left, verdict, chosen_by, nonce, "
                "strength, note, seconds, time, undoes) "
                "VALUES (?, ?, ?, 'undo', ?, ?, 1, '', 0.0, ?, ?) ON CONFLICT (undoes) DO NOTHING",
                (
                    *(vote.pair, vote.annotator, vote.shown_left, vote.chosen_by),
                    *(f"undo-{vote.id}", now(), vote.id),
                ),
            )

    def votes(self) -> list[Vote]:
        """Return all votes that were not undone, in the order in which they were given."""
        rows = self._connection.execute(
            f"SELECT {_VOTE} FROM votes WHERE verdict != 'undo' AND id NOT IN "
            "(SELECT undoes FROM votes WHERE undoes IS NOT NULL) ORDER BY id"
        )
        return [Vote(*row) for row in rows]

    def num_rows(self) -> int:
        """Return the number of rows of votes, undone ones and undoing ones counted."""
        (number,) = self._connection.execute("SELECT count(*) FROM votes").fetchone()
        return int(number)

    def add_fit(self, measures: dict[str, Any]) -> None:
        """Add the measures of a fit of the reward model's head."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO fits (time, measures) VALUES (?, ?)", (now(), json.dumps(measures))
            )

    def fits(self) -> list[dict[str, Any]]:
        """Return the measures of all fits, in their order."""
        rows = self._connection.execute("SELECT measures FROM fits ORDER BY id")
        return [json.loads(measures) for (measures,) in rows]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
