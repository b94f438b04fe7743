"""Readers: files of any format, and the hub, to rows."""
