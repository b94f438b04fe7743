"""Errors that ranks raise; they are here so that the command line knows them without torch."""

RANK_FAILED = 4  # exit code of a rank that ends because another is missing


class RankFailed(RuntimeError):
    """Another rank of the run is missing; the message names it."""


class RanksDiffer(ValueError):
    """A fault that every rank raises alike: one process of a machine is enough to print it."""


class UserCodeFailed(Exception):
    """Code of the user's raised an error, which every rank raises alike; names its source.

    Attributes:
        trace: traceback of the user's own frames, on the rank that ran them.
    """

    trace: str = ""
