"""Registration of `token_kl`."""

from types import ModuleType

from fastalign.ops.registration import register_rows
from fastalign.ops.token_kl import native, reference
from fastalign.ops.token_kl.reference import Inputs


def _launchers(backend: str) -> ModuleType:
    """Return the backend's `forward` and `backward`; Triton, which may be missing, comes late."""
    if backend == "triton":
        from fastalign.ops.token_kl import triton_kernels

        return triton_kernels
    return native if backend == "native" else reference


RESULTS = ("kl", "maximum", "log_total", "reference_maximum", "reference_log_total")
token_kl_forward = register_rows("token_kl", Inputs, RESULTS, 1, _launchers)
