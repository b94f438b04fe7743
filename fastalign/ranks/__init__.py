"""Ranks: the processes of a run, and how they share its models."""
