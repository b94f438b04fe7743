"""The backends of `head_tile_statistics` and `head_tile_gradient`."""
