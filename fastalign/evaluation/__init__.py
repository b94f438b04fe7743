"""Accuracy, reward, KL to the reference, and the report."""
