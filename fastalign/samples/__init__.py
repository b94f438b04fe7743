"""Small real data shipped with the package; each folder holds its licence and attribution."""

from pathlib import Path


def folder(name: str) -> Path:
    """Return the folder of a shipped sample, as `folder("pros_cons") / "pairs_train.jsonl"`.

    Raises:
        ValueError: `name` is not shipped.
    """
    root = Path(__file__).parent
    shipped = sorted(entry.name for entry in root.iterdir() if (entry / "README.md").is_file())
    if name not in shipped:
        raise ValueError(f"no sample is named {name!r}; shipped are: {', '.join(shipped)}")
    return root / name
