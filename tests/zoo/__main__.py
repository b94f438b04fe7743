"""`python -m tests.zoo [TYPE ...]`: what each causal model type can do, in docs/models.md's table.

Without types, all of them. Rows of other types stay as they are. Exit code 1 if a row has an error
that is no refusal in one line.
"""

import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.zoo.zoo import TYPES, YES, run_row

DOCS = Path(__file__).parents[2] / "docs/models.md"
HEAD = (
    "| type | verdict | log-prob | gradient | trains | LoRA | reward model | samples | why not |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def rows_of(text: str) -> dict[str, str]:
    """Return the lines of the table by their type."""
    body = text.partition(HEAD)[2]
    return {line.split("|")[1].strip(): line for line in body.splitlines() if line.startswith("|")}


def cells_of(line: str) -> list[str]:
    """Return the cells of a row of the table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def summary_of(rows: dict[str, str]) -> str:
    """Return the sentence that counts the table's rows."""
    cells = [cells_of(line) for line in rows.values()]
    kinds = {kind: sum(row[1] == kind for row in cells) for kind in ("packed", "padded", "refused")}
    able = [sum(row[column] == YES for row in cells) for column in range(4, 8)]
    return (
        f"Of {len(cells)} types {kinds['packed']} are packed, {kinds['padded']} padded and "
        f"{kinds['refused']} refused; {able[0]} train, {able[1]} under LoRA, {able[2]} as reward "
        f"models, and {able[3]} are sampled from."
    )


def main(types: list[str]) -> int:
    """Run the rows, print them, and write them into the documentation."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for model_type in types or TYPES:
            start = time.perf_counter()
            line = run_row(model_type, Path(folder) / model_type).line
            print(f"{time.perf_counter() - start:5.1f} s  {line}", flush=True)
            rows = write_row(model_type, line)
    print(summary_of(rows))
    return int(any("ERROR" in line for line in rows.values()))


def write_row(model_type: str, line: str) -> dict[str, str]:
    """Write a row into the documentation; return all rows."""
    text = DOCS.read_text(encoding="utf-8")
    rows = dict(sorted({**rows_of(text), model_type: line}.items()))
    before = re.sub(r"Of \d+ types .*", summary_of(rows), text.partition(HEAD)[0])
    DOCS.write_text(before + HEAD + "".join(f"{row}\n" for row in rows.values()), "utf-8")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
