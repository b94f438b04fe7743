"""Fixtures of the trainers' tests."""

from tests.small_runs import _one_thread, folder

__all__ = ["_one_thread", "folder"]
