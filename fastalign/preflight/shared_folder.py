"""Whether all ranks see one folder: rank 0 writes a word there, and the others read it."""

import secrets
import shutil
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from fastalign.preflight.meeting import BETWEEN_TRIES_SECONDS, Deadline, Facts, Meeting, named
from fastalign.ranks.world import World

LONGEST_LAG_SECONDS = 5.0  # of a file on a shared disk, until other machines see it


class SharedFolder:
    """The run's folder as all ranks see it: rank 0 writes a word there, the others read it.

    What was made for that is removed again.

    Args:
        folder: of the run.
        world: of this process.
        meeting: tells the ranks which word.
    """

    def __init__(self, folder: Path, world: World, meeting: Meeting) -> None:
        self._folder, self._world, self._meeting = folder, world, meeting
        self._made: list[Path] = []
        self._files: list[Path] = []

    def __enter__(self) -> "SharedFolder":
        """Rank 0 writes, and says what the others are to find."""
        if self._world.is_first:
            word, fault = secrets.token_hex(8), ""
            try:
                missing = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
                self._folder.mkdir(parents=True, exist_ok=True)
                self._made = missing
                self._write(f".preflight-{word}", word)
            except OSError as error:
                fault = f"cannot be written ({error.strerror})"
            self._meeting.store.set("word", word)
            self._meeting.store.set("word/fault", fault)
        return self

    def __exit__(self, *error: object) -> None:
        """Removes what this rank made, the folders too."""
        for file in self._files:
            file.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # a run has begun in it
                folder.rmdir()

    def look(self, deadline: Deadline) -> Facts:
        """Whether this rank sees rank 0's word, can write beside it, and the room that is left."""
        store = self._meeting.store
        store.wait(["word", "word/fault"], timedelta(seconds=deadline.left()))
        word, fault = store.get("word").decode(), store.get("word/fault").decode()
        free = 0
        if not fault:
            lag = Deadline(min(LONGEST_LAG_SECONDS, deadline.left() / 4))
            try:
                seen = self._read(f".preflight-{word}", lag)
                if seen == word:
                    own = self._write(f".preflight-{word}-{self._world.rank}", word)
                    own.unlink()  # before rank 0 removes a folder that it made
                    free = shutil.disk_usage(self._folder).free
                else:
                    fault = "not shared"
            except OSError as error:
                fault = f"cannot be written ({error.strerror})"
        return {"folder": str(self._folder.absolute()), "free": free, "fault": fault}

    def faults_of(self, rows: list[Facts]) -> list[str]:
        """One line for all ranks that do not see rank 0's word, one for each other fault."""
        faults = []
        for fault in dict.fromkeys(row["fault"] for row in rows if row["fault"]):
            ranks = [rank for rank, row in enumerate(rows) if row["fault"] == fault]
            where = f"run.dir: {rows[ranks[0]]['folder']}"
            who = named(ranks, self._meeting.hosts)
            if fault == "not shared":
                fault = f"does not hold the file that rank 0 on {self._meeting.hosts[0]} wrote"
                where, who = f"{where} is not shared", f"on {who} it"
                faults.append(f"{where}: {who} {fault}")
            else:
                faults.append(f"{where} {fault} on {who}")
        return faults

    def _write(self, name: str, word: str) -> Path:
        file = self._folder / name
        self._files.append(file)
        file.write_text(word, encoding="ascii")
        return file

    def _read(self, name: str, lag: Deadline) -> str:
        while True:
            with suppress(FileNotFoundError):
                return (self._folder / name).read_text(encoding="ascii")
            if lag.left() <= BETWEEN_TRIES_SECONDS:
                return ""
            time.sleep(BETWEEN_TRIES_SECONDS)
