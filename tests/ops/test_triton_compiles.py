"""The Triton kernels compile ahead of time for GPUs that are not here, without spills."""

from dataclasses import replace

import pytest

from fastalign.ops import triton_table
from fastalign.ops.gae.triton_kernels import MAX_BLOCK as gae_block
from fastalign.ops.kl_penalty.triton_kernels import MAX_BLOCK as kl_penalty_block
from fastalign.ops.preference_loss import LinkFunction
from fastalign.ops.preference_loss.triton_kernels import BLOCK as preference_block
from tests.ops.ahead_of_time import Entry, compile_for

FLAGS = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True}
LONG_ROW = 128_256


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
    module = "fastalign.ops.head.head_tile.triton_kernels"
    constants = {
        "HAS_TEMPERATURE": True,
        "HAS_SOFTCAP": True,
        "HAS_GRADIENT": True,
        "HAS_GRAD_LOGPROB": True,
        "HAS_GRAD_ENTROPY": True,
    }
    types = {"targets_ptr": "*i64", "ignored_ptr": "*i8", "is_argmax_ptr": "*i8"}
    types |= {"softcap": "fp32", "logit_scale": "fp32"}
    return [
        Entry(module, "head_tile_kernel", {**types, "gradient_ptr": f"*{dtype}"}, constants)
        for dtype in ("fp32", "bf16")
    ]


def preference_loss_entries() -> list[Entry]:
    module = "fastalign.ops.preference_loss.triton_kernels"
    types = {"bounds_ptr": "*i64", "length_ptr": "*i64", "tie_ptr": "*i8"}
    numbers = ("beta", "length_weight", "threshold", "right", "wrong", "tie_offset")
    types |= dict.fromkeys(numbers, "fp32")
    flags = ("PER_TOKEN", "HAS_REFERENCE", "HAS_LENGTH", "HAS_TIE")
    constants = {**dict.fromkeys(flags, True), "BLOCK": preference_block}
    kernel, backward = "preference_loss_fwd_kernel", "preference_loss_bwd_kernel"
    entries = [
        Entry(module, kernel, types, {**constants, "LINK": int(link)}, num_warps=4)
        for link in LinkFunction
    ]
    constants = {"HAS_GRAD_SEQUENCE_LOGPROB": True, "BLOCK": preference_block}
    return [*entries, Entry(module, backward, types, constants, num_warps=4)]


def packed_entries() -> list[Entry]:
    module = "fastalign.ops.kl_penalty.triton_kernels"
    types = {"bounds_ptr": "*i64", "mask_ptr": "*u8", "coefficient": "fp32", "max_k3": "fp32"}
    shared = {"ESTIMATOR": "k3", "HAS_MASK": True, "BLOCK": kl_penalty_block}
    forward = {**shared, "HAS_SCORE": True, "HAS_ADAPTIVE": True}
    backward = {**shared, "HAS_GRAD_KL": True, "HAS_GRAD_SEQUENCE_KL": True}
    numbers = ("gamma_high", "gamma_low", "decay_high", "decay_low")
    gae_types = {"bounds_ptr": "*i64", **dict.fromkeys(numbers, "fp32")}
    gae_constants = {"HAS_BOOTSTRAP_VALUE": True, "BLOCK": gae_block}
    return [
        Entry(module, "kl_penalty_fwd_kernel", types, forward, num_warps=4),
        Entry(module, "kl_penalty_bwd_kernel", types, backward, num_warps=4),
        Entry("fastalign.ops.gae.triton_kernels", "gae_kernel", gae_types, gae_constants, 4),
    ]


def head_tile_split_entries() -> list[Entry]:
    module = "fastalign.ops.head.head_tile.triton_kernels"
    flags = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True}
    types = {"targets_ptr": "*i64", "ignored_ptr": "*i8", "softcap": "fp32", "logit_scale": "fp32"}
    upstream = {"HAS_GRAD_LOGPROB": True, "HAS_GRAD_ENTROPY": True}
    gradients = [
        Entry(
            module,
            "head_tile_gradient_kernel",
            {**types, "gradient_ptr": f"*{dtype}"},
            {**flags, **upstream},
        )
        for dtype in ("fp32", "bf16")
    ]
    statistics = {**flags, "HAS_WEIGHTED": True}
    return [Entry(module, "head_tile_statistics_kernel", types, statistics), *gradients]


def token_kl_entries() -> list[Entry]:
    module = "fastalign.ops.token_kl.triton_kernels"
    flags = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "HAS_IGNORED": True}
    entries = []
    for dtype, over in (("fp32", True), ("bf16", False), ("fp16", True)):
        types = {"logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}", "reference_ptr": "*bf16"}
        types |= {"ignored_ptr": "*i8", "softcap": "fp32"}
        constants = {**flags, "OVER_REFERENCE": over}
        for kernel in ("token_kl_fwd_kernel", "token_kl_bwd_kernel"):
            entries.append(Entry(module, kernel, types, constants))
    return entries


def kl_tile_entries() -> list[Entry]:
    module = "fastalign.ops.head.kl_tile.triton_kernels"
    flags = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "HAS_GRADIENT": True}
    types = {"targets_ptr": "*i64", "ignored_ptr": "*i8", "softcap": "fp32", "logit_scale": "fp32"}
    entries = []
    for dtype, over, brackets in (
        ("fp32", True, True),
        ("bf16", False, True),
        ("bf16", True, False),
    ):
        places = {"gradient_ptr": f"*{dtype}", "kl_gradient_ptr": f"*{dtype}"}
        constants = {**flags, "OVER_REFERENCE": over, "BRACKETS": brackets}
        entries.append(Entry(module, "kl_tile_kernel", {**types, **places}, constants))
    return entries


ENTRIES = [
    *token_logprob_entries(),
    *head_tile_entries(),
    *preference_loss_entries(),
    *packed_entries(),
    *head_tile_split_entries(),
    *token_kl_entries(),
    *kl_tile_entries(),
]


def as_launched(entry: Entry, architecture: int) -> Entry:
    """The entry with the table's blocks and warps for the architecture."""
    if entry.kernel not in triton_table.read_table():
        return entry
    options = triton_table.configuration(entry.kernel, architecture).options(LONG_ROW)
    num_warps = options.pop("num_warps")
    return replace(entry, constants=entry.constants | options, num_warps=num_warps)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spills_for(architecture: int) -> None:
    entries = [as_launched(entry, architecture) for entry in ENTRIES]
    for found in compile_for(architecture, entries):
        assert found.stack_bytes == 0, found
        assert found.shared_bytes <= 1024, found  # reductions over warps only: a few words each


def test_every_kernel_of_the_table_is_compiled_above() -> None:
    assert triton_table.read_table().keys() <= {entry.kernel for entry in ENTRIES}


def test_a_gpu_takes_the_newest_configuration_that_is_not_newer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = [triton_table.Configuration(c, c * 10, 8, None) for c in (100, 90, 80)]
    monkeypatch.setattr(triton_table, "read_table", lambda: {"kernel": table})
    found = [triton_table.configuration("kernel", c).block for c in (75, 80, 89, 90, 120)]
    assert found == [800, 800, 800, 900, 1000]
