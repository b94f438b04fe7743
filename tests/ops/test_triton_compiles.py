"""The Triton kernels compile ahead of time for GPUs that are not here, without spills."""

import pytest

from fastalign.ops.head_tile.triton_kernels import MAX_BLOCK as head_tile_block
from fastalign.ops.kl_tile.triton_kernels import MAX_BLOCK as kl_tile_block
from fastalign.ops.token_kl.triton_kernels import MAX_BLOCK as token_kl_block
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


def head_tile_entries() -> list[Entry]:
    module = "fastalign.ops.head_tile.triton_kernels"
    constants = {
        "HAS_TEMPERATURE": True,
        "HAS_SOFTCAP": True,
        "HAS_GRADIENT": True,
        "HAS_GRAD_LOGPROB": True,
        "HAS_GRAD_ENTROPY": True,
        "BLOCK": head_tile_block,
    }
    types = {"targets_ptr": "*i64", "ignored_ptr": "*i8", "is_argmax_ptr": "*i8"}
    types |= {"softcap": "fp32", "logit_scale": "fp32"}
    return [
        Entry(module, "head_tile_kernel", {**types, "gradient_ptr": f"*{dtype}"}, constants)
        for dtype in ("fp32", "bf16")
    ]


def token_kl_entries() -> list[Entry]:
    module = "fastalign.ops.token_kl.triton_kernels"
    flags = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "HAS_IGNORED": True}
    entries = []
    for dtype, over in (("fp32", True), ("bf16", False), ("fp16", True)):
        types = {"logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}", "reference_ptr": "*bf16"}
        types |= {"ignored_ptr": "*i8", "softcap": "fp32"}
        constants = {**flags, "OVER_REFERENCE": over, "BLOCK": token_kl_block}
        for kernel in ("token_kl_fwd_kernel", "token_kl_bwd_kernel"):
            entries.append(Entry(module, kernel, types, constants))
    return entries


def kl_tile_entries() -> list[Entry]:
    module = "fastalign.ops.kl_tile.triton_kernels"
    flags = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "HAS_GRADIENT": True}
    types = {"targets_ptr": "*i64", "ignored_ptr": "*i8", "softcap": "fp32", "logit_scale": "fp32"}
    entries = []
    for dtype, over, brackets in (
        ("fp32", True, True),
        ("bf16", False, True),
        ("bf16", True, False),
    ):
        places = {"gradient_ptr": f"*{dtype}", "kl_gradient_ptr": f"*{dtype}"}
        constants = {**flags, "OVER_REFERENCE": over, "BRACKETS": brackets, "BLOCK": kl_tile_block}
        entries.append(
            Entry(module, "kl_tile_kernel", {**types, **places}, constants, num_warps=16)
        )
    return entries


ENTRIES = [
    *token_logprob_entries(),
    *head_tile_entries(),
    *token_kl_entries(),
    *kl_tile_entries(),
]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spills_for(architecture: int) -> None:
    for kernel, shared, stack in compile_for(architecture, ENTRIES):
        # Reductions over warps only: a few words each.
        assert (shared <= 1024, stack) == (True, [0]), (kernel, shared, stack)
