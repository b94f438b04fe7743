"""Fixtures of the tests of ranks."""

from tests.small_runs import _one_thread, folder

__all__ = ["_one_thread", "folder"]
