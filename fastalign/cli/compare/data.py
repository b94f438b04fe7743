"""`fastalign compare export`, `compare import` and `compare results`."""

import json
from pathlib import Path

from fastalign.cli.answers.sampling import as_lines
from fastalign.cli.compare.settings import (
    CompareExportConfig,
    CompareImportConfig,
    CompareResultsConfig,
)
from fastalign.cli.report import show
from fastalign.compare.export import exported_rows
from fastalign.compare.imports import add_imported, read_imported
from fastalign.compare.results import (
    PERSON_COLUMNS,
    person_rows,
    results,
    summary_rows,
    win_rate_lines,
)
from fastalign.compare.store import Store
from fastalign.written_files import check_file, write_file


def export(config: CompareExportConfig) -> int:
    """Run `fastalign compare export`; return 0 when the file is written."""
    inputs = [("database", Path(config.database))]
    store = Store(config.database)
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=inputs)
    rows = list(
        exported_rows(
            store.pairs(),
            store.votes(),
            store.annotators(),
            both_bad=config.both_bad,
            details=config.details,
        )
    )
    store.close()
    if not rows:
        raise ValueError(f"{config.database}: expected pairs with votes, found none")
    write_file(out, as_lines(rows), overwrite=config.overwrite)
    num_votes = int(sum(sum(row["votes"].values()) for row in rows))
    print(f"{len(rows)} pairs with {num_votes} votes written to {out}")
    return 0


def import_(config: CompareImportConfig) -> int:
    """Run `fastalign compare import`; return 0 when the votes are in the database."""
    found = [(path, list(read_imported(path, config.annotator))) for path in config.files]
    if not found:
        raise ValueError("expected a file or more, got none")
    store = Store(config.out, create=True)
    with store.only_writer():
        for path, rows in found:
            num_pairs, num_votes, counts = add_imported(store, rows)
            words = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
            print(
                f"{path}: {len(rows)} comparisons; new in {config.out}: {num_pairs} pairs, "
                f"{num_votes} votes" + (f" ({words})" if words else "")
            )
    store.close()
    return 0


def show_results(config: CompareResultsConfig) -> int:
    """Run `fastalign compare results`; return 0 when they are printed."""
    store = Store(config.database)
    out = None
    if config.out is not None:
        inputs = [("database", Path(config.database))]
        out = check_file("out", config.out, overwrite=config.overwrite, inputs=inputs)
    found = results(store)
    store.close()
    show(("measure", "value"), summary_rows(found), num_left=2)
    if found["annotators"]:
        show(PERSON_COLUMNS, person_rows(found))
    print("".join(f"{line}\n" for line in win_rate_lines(found)), end="")
    if out is not None:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        write_file(out, text, overwrite=config.overwrite)
        print(f"written to {out}")
    return 0
