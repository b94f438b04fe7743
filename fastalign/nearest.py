"""Find what a mistyped name or path may have meant, for the end of an error message."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `names` that is most like `name`, whatever its case, or None."""
    by_lower = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def nearest_path(path: str | Path) -> str | None:
    """Return the path of the file or folder beside a missing one with the most similar name.

    Where the folder itself is missing, a similar one of its parent's that has the name.
    """
    missing = Path(path)
    folder = missing.expanduser().parent
    try:
        if folder.is_dir():
            name = nearest(missing.name, (each.name for each in folder.iterdir()), 0.75)
            return name and str(missing.parent / name)
    except OSError:  # a folder that cannot be listed, a name that is too long
        return None
    beside = nearest_path(missing.parent) if folder != folder.parent else None
    found = Path(beside or "", missing.name)
    return str(found) if beside and found.expanduser().exists() else None


def did_you_mean(name: str | None) -> str:
    """Return ` (did you mean NAME?)`, or nothing for None."""
    return f" (did you mean {name}?)" if name else ""
