"""Batches: examples packed without padding, and a step's examples cut into micro-batches."""
