r"""Sources of training data as settings name them: `a.jsonl:2` is a path and its weight.

A source of weight w has each of its rows w times in an epoch. The weight is a number behind the
last colon; a drive (`C:\data\a.jsonl`), a scheme (`s3://bucket/a.jsonl`), a split of the hub
(`owner/name:train`) and the name of a file that exists are no weights.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from fastalign.in_memory import InMemory

MOST_WEIGHT = 10000.0
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"\w+://[^/]*:\d+")


class WeightedSource(NamedTuple):
    """A source of training data.

    Attributes:
        path: a file, a folder or a hub name.
        weight: how often an epoch has each of its rows, above 0.
    """

    path: str
    weight: float = 1.0


def weighted_source(text: str) -> WeightedSource:
    """Return the source and the weight that a text names, `PATH` or `PATH:WEIGHT`.

    Raises:
        ValueError: if the weight is no number above 0, or it is unclear whether it is one.
    """
    path, colon, weight = text.rpartition(":")
    if not path or not colon or _HOST_AND_PORT.fullmatch(text):
        return WeightedSource(text)
    is_number = _NUMBER.fullmatch(weight) is not None
    if _exists(text):
        if is_number and _exists(path):
            raise ValueError(
                f"data.train: there are {text} and {path}; write {text}:1 for the first, and "
                f"{path}:{float(weight)} for the second with a weight"
            )
        return WeightedSource(text)
    if not is_number:
        if _exists(path) and re.match(r"[\d.+-]|$", weight):
            raise ValueError(
                f"data.train: expected a number above 0 as the weight of {path}, such as {path}:2 "
                f"or {path}:0.5, got {weight!r}"
            )
        return WeightedSource(text)
    if not 0 < float(weight) <= MOST_WEIGHT:
        raise ValueError(
            f"data.train: expected a weight above 0 and at most {MOST_WEIGHT:g} behind {path}:, "
            f"got {weight}"
        )
    return WeightedSource(path, float(weight))


def weighted_sources(train: str | Sequence[str]) -> list[WeightedSource]:
    """Return the sources that `data.train` names, in their order.

    Raises:
        ValueError: if there is none, one is named twice, or a weight is at fault.
    """
    if isinstance(train, InMemory):
        return [WeightedSource(train)]
    texts = [train] if isinstance(train, str) else list(train)
    known = "a file, folder or hub name"
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"data.train: expected {known}, or several, got {train!r}")
    found = []
    places: dict[str, str] = {}
    for text in texts:
        first, *others = re.split(r"[,\s]+", text.strip())
        if others and _exists(_without_weight(first)) and not _exists(_without_weight(text)):
            raise ValueError(
                f"data.train: no such file: {text}; several sources are words of their own, "
                f"without commas or quotes: {' '.join([first, *others])}"
            )
        source = weighted_source(text)
        place = _place(source.path)
        if place in places:
            raise ValueError(
                f"data.train: {source.path} is named twice; a weight says how often an epoch has "
                f"its rows: {source.path}:2"
            )
        places[place] = text
        found.append(source)
    return found


def checked_sources(train: str | Sequence[str]) -> str | tuple[str, ...]:
    """Return `data.train` as settings hold it: one source as text, several as a tuple of texts.

    Raises:
        ValueError: as `weighted_sources`.
    """
    weighted_sources(train)
    if isinstance(train, str):
        return train
    return train[0] if len(train) == 1 else tuple(train)


def _exists(path: str) -> bool:
    return os.path.lexists(os.path.expanduser(path))


def _without_weight(text: str) -> str:
    path, _, weight = text.rpartition(":")
    return path if path and _NUMBER.fullmatch(weight) else text


def _place(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path)) if _exists(path) else path
