"""Checks before a run on several processes."""
