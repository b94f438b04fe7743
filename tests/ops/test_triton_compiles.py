"""The Triton kernels compile ahead of time for GPUs that are not here, without spills."""

import pytest

from fastalign.ops.token_logprob.triton_kernels import MAX_BLOCK
from tests.ops.ahead_of_time import Entry, compile_for

FLAGS = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "BLOCK": MAX_BLOCK}


def token_logprob_entries() -> list[Entry]:
    module = "fastalign.ops.token_logprob.triton_kernels"
    entries = []
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}", "targets_ptr": "*i64"}
        types["softcap"] = "fp32"
        entries.append(Entry(module, "token_logprob_fwd_kernel", types, FLAGS))
        constants = {**FLAGS, "HAS_GRAD_ENTROPY": True}
        entries.append(Entry(module, "token_logprob_bwd_kernel", types, constants))
    return entries


ENTRIES = [*token_logprob_entries()]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spills_for(architecture: int) -> None:
    for kernel, shared, stack in compile_for(architecture, ENTRIES):
        # Reductions over warps only: a few words each.
        assert shared <= 1024 and stack == [0], (kernel, shared, stack)
