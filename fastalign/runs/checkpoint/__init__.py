"""Checkpoints: written while training goes on, restored on any number of ranks."""
