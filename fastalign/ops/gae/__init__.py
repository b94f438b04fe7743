"""`gae`: generalised advantage estimation over packed responses."""

from fastalign.ops.gae.api import gae

__all__ = ["gae"]
