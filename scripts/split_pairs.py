"""Split a file of comparisons into training and held-out pairs, the same way every time.

A hash of the prompt and the two responses, in either order, decides: neither the order of the rows
nor a seed matters, and all copies of a pair are on one side. Single responses may occur in both
files, as comparisons of one collection share them.

    python scripts/split_pairs.py pairs.jsonl.gz --train train.jsonl --held-out held_out.jsonl
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from fastalign.data.columns import COLUMNS
from fastalign.data.readers.files import shown_entries
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows
from fastalign.written_files import check_file, write_file

SIDES = (("response_a", "response_b"), ("chosen", "rejected"))


def fraction_of(where: str, row: Mapping[str, object]) -> float:
    """Return a number in [0, 1) that depends only on the pair.

    Raises:
        DataFault: if the row holds no pair.
    """
    found = next((sides for sides in SIDES if all(side in row for side in sides)), None)
    if found is None:
        raise DataFault(where, "expected response_a and response_b, or chosen and rejected")
    responses = sorted(json.dumps(row[side]) for side in found)
    text = "\0".join([json.dumps(row.get("prompt")), *responses])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def main() -> int:
    """Write both files; return 0, or 2 after a caller's mistake."""
    parser = argparse.ArgumentParser(
        description="Split comparisons into training and held-out pairs by a hash."
    )
    parser.add_argument("pairs", help="file, folder or hub name")
    parser.add_argument("--train", required=True, help="file (.jsonl) to write")
    parser.add_argument("--held-out", required=True, help="file (.jsonl) to write")
    parser.add_argument("--share", type=float, default=0.1, help="share of the held-out pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args()
    try:
        if not 0 < options.share < 1:
            raise ValueError(f"--share: expected a number between 0 and 1, got {options.share}")
        outputs = {}
        for held_out, name in ((False, options.train), (True, options.held_out)):
            setting = "--held-out" if held_out else "--train"
            inputs = [("data.pairs", Path(options.pairs).resolve())]
            outputs[held_out] = check_file(
                setting,
                name,
                overwrite=options.overwrite,
                inputs=inputs if inputs[0][1].exists() else [],
            )
        if outputs[False].resolve() == outputs[True].resolve():
            raise ValueError(f"--held-out: {options.held_out} is the file of --train, too")
        parts: dict[bool, list[str]] = {True: [], False: []}
        unread: list[str] = []
        for row in read_rows(options.pairs, COLUMNS, unread):
            if isinstance(row, DataFault):
                raise row
            held_out = fraction_of(row.where, row.values) < options.share
            parts[held_out].append(json.dumps(row.values, ensure_ascii=False) + "\n")
        if unread:
            print(f"{options.pairs}: not read: {shown_entries(unread)}")
        for held_out, path in outputs.items():
            write_file(path, "".join(parts[held_out]), overwrite=options.overwrite)
            print(f"{len(parts[held_out])} pairs written to {path}")
    except (ValueError, OSError) as error:
        print(f"split_pairs: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
