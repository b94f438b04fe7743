"""Real processes for the pre-flight check, forked from one that has imported all: they start alike.

Reads lists of ranks from standard input, one a line: {"arguments", "environment", "versions"};
answers each with a line, [exit code, stdout, stderr] of each rank.
"""

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from fastalign.cli import main as cli
from fastalign.cli import preflight

assert preflight.ALGORITHMS


def become(rank: dict[str, Any], folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(rank["environment"])
    preflight.version = lambda name: rank["versions"].get(name) or metadata.version(name)
    cli.SECONDS_FOR_RANK_0 = 0  # no torchrun ends the others when one prints its error
    sys.argv = ["fastalign", "preflight", *rank["arguments"]]
    try:
        cli.console()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))


def outcomes(ranks: list[dict[str, Any]], root: Path) -> list[tuple[int, str, str]]:
    children = []
    for number, rank in enumerate(ranks):
        folder = root / str(number)
        folder.mkdir()
        child = os.fork()
        if not child:
            become(rank, folder)
        children.append((child, folder))
    found = []
    for child, folder in children:
        status = os.waitpid(child, 0)[1]
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        found.append((os.waitstatus_to_exitcode(status), out, err))
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as logs:
            print(json.dumps(outcomes(json.loads(line), Path(logs))), flush=True)
