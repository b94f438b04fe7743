"""Rows of a data set on the hub, through `datasets`."""

import re
from collections.abc import Iterator

from fastalign.data.readers.row import DataFault, Row

_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)"
    r"(?::(?P<config>[^:\[\]]+)(?=:))?"
    r"(?::(?P<split>\w+(?:\[[^\]]*\])?))?"
)


def is_hub_name(source: str) -> bool:
    """Whether the text can be `owner/name`, `owner/name:split` or `owner/name:config:split`."""
    return _NAME.fullmatch(source) is not None


def hub_rows(source: str) -> Iterator[Row | DataFault]:
    """Rows of a hub data set, numbered from 1; the split is `train` unless named.

    Raises:
        DataFault: the hub (or its local cache) has no such data set, configuration or split.
    """
    match = _NAME.fullmatch(source)
    assert match is not None, source
    from datasets import load_dataset

    split = match["split"] or "train"
    try:
        table = load_dataset(match["name"], match["config"], split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataFault(
            source, f"no such file or folder here, and not from the hub: {reason}"
        ) from None
    for number, values in enumerate(table, start=1):
        yield Row(f"{source}:{number}", values)
