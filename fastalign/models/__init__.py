"""Models: loading and saving, the forward of a packed batch, adapters, and reward models."""
