"""A probe of Triton's interpreter, in which kernels run on a CPU.

Triton 3.6 turns a loop's bound into an index by `int(array)`, which newer versions of numpy refuse.
"""

import functools
import warnings

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(count_ptr, num_steps):
    count = 0
    for _ in range(0, num_steps):
        count += 1
    tl.store(count_ptr, count)


@functools.cache
def interpreter_failure() -> str | None:
    """Why the interpreter cannot run a loop here; None: it can. Deprecations are no failure."""
    count = torch.zeros(1, dtype=torch.int64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _count_kernel[(1,)](count, 3)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter fails: {error}"
    assert count.item() == 3
    return None


def is_interpreted(item: pytest.Item) -> bool:
    """Whether a test was given the backend `triton` by its parameters."""
    call = getattr(item, "callspec", None)
    return call is not None and any(map(_names_triton, call.params.values()))


def _names_triton(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_names_triton, value))
    return isinstance(value, str) and value == "triton"
