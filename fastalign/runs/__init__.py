"""What every run shares: settings, folder, loop, checkpoints, metrics."""
