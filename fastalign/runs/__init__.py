"""Runs: the settings, folder, loop, checkpoints and metrics that all algorithms share."""
