"""Registration of `token_logprob`."""

from types import ModuleType

from fastalign.ops.registration import register_rows
from fastalign.ops.token_logprob import native, reference
from fastalign.ops.token_logprob.reference import Inputs


def _launchers(backend: str) -> ModuleType:
    """Return the backend's `forward` and `backward`; Triton, which may be missing, comes late."""
    if backend == "triton":
        from fastalign.ops.token_logprob import triton_kernels

        return triton_kernels
    return native if backend == "native" else reference


RESULTS = ("logprob", "entropy", "maximum", "log_total")
token_logprob_forward = register_rows("token_logprob", Inputs, RESULTS, 2, _launchers)
