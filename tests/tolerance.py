"""The one tolerance: a kernel may be no worse than eager PyTorch at the same dtype.

Truth is float64, computed from the already quantised inputs. A kernel's mean and largest error may
not exceed eager's, plus a slack derived from the dtype's eps and the length of the reduction.
"""

import math

import torch
from torch import Tensor


def slack(truth: Tensor, dtype: torch.dtype, length: int, scale: float) -> float:
    """What rounding alone may cost: eps of the result's dtype, and float32 sums of `length` terms.

    Sums accumulate in float32 whatever the inputs' dtype, so their part has float32's eps, on
    terms of size `scale`; random rounding errors grow with the square root of the length.
    """
    finite = truth[truth.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of_sums = 4 * torch.finfo(wide).eps * math.sqrt(max(length, 1))
    return torch.finfo(dtype).eps * size + of_sums * max(size, scale)


def assert_no_worse(
    name: str,
    kernel: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype,
    length: int,
    scale: float,
) -> None:
    """Compares a kernel's error with eager's; names the worst element when it is too large.

    Args:
        name: of the value, for the message.
        kernel: the result under test.
        eager: the plain PyTorch lines at the same dtype.
        truth: the same in float64.
        dtype: of the result: what it was rounded to.
        length: terms of the reduction.
        scale: largest magnitude that goes into it (of the logits, for a log-prob).
    """
    assert kernel.shape == eager.shape == truth.shape, name
    if kernel.numel() == 0:
        return
    allowed = slack(truth, dtype, length, scale)
    special = ~truth.isfinite()
    assert torch.equal(kernel.double()[special].nan_to_num(9.0), truth[special].nan_to_num(9.0)), (
        f"{name}: infinities or NaNs differ"
    )
    ordinary = ~special
    if not bool(ordinary.any()):
        return
    ours = (kernel.double() - truth)[ordinary].abs()
    theirs = (eager.double() - truth)[ordinary].abs()
    theirs = theirs.nan_to_num(0.0)
    worst = int(ours.nan_to_num(torch.inf).argmax())
    for measure, found, reference in (
        ("largest", ours.max(), theirs.max()),
        ("mean", ours.mean(), theirs.mean()),
    ):
        assert float(found) <= float(reference) + allowed, (
            f"{name}: {measure} error {float(found):.3e}, eager's {float(reference):.3e} plus "
            f"{allowed:.3e}; worst element {worst}: {kernel[ordinary].flatten()[worst]} for "
            f"{truth[ordinary].flatten()[worst]}"
        )
