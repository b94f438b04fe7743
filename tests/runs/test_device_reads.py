"""A step reads its numbers from the device once, however many micro-batches and metrics it has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.batch.packed import PackedBatch
from fastalign.runs.accumulate import Part, Total, read_numbers, read_totals
from tests.device_reads import DeviceReads
from tests.runs.read_cases import STEPS, Step


def reads_of(step: Step, patched: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """What a step reads of the device's tensors, which begin with its models and its batches."""
    take, models = step
    held = [value for model in models for value in (*model.parameters(), *model.buffers())]
    reads, move = DeviceReads(held), PackedBatch.to

    def to(batch: PackedBatch, device: Any) -> PackedBatch:
        tensors = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        for value in tensors.values():
            reads.add(value)
        return move(replace(batch, **tensors), device)

    patched.setattr(PackedBatch, "to", to)
    # what a library's code writes does not descend from anything that PyTorch sees
    patched.setattr("fastalign.ops.native_library.unusable_reason", lambda *_: "not seen here")
    # on a GPU these return at once: they look at targets and bounds on a CPU alone
    patched.setattr("fastalign.ops.head.arguments.check_targets", lambda *_: None)
    patched.setattr("fastalign.ops.segments.check_bounds", lambda *_: None)
    with reads:
        metrics = take()
    return reads.reads, metrics


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_the_device_once(
    folder: Path, name: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, metrics = reads_of(STEPS[name](folder, packing, "cpu"), monkeypatch)
    assert found == ["tolist"]
    assert metrics["num_micro_batches"] > 2
    assert len(metrics) > 4
    assert metrics["grad_norm"] > 0


def test_the_counter_sees_every_way_of_reading() -> None:
    host, device = torch.arange(4.0), torch.arange(4.0)
    mask = host > 1

    def all_ways(values: torch.Tensor) -> None:
        doubled = 2 * values[1:].clone()
        doubled.sum().item()
        float(doubled[0])
        bool((doubled > 0).any())
        doubled.tolist()
        doubled.cpu()
        doubled.numpy()
        doubled.nonzero()
        doubled[doubled > 2]
        doubled[doubled > 2] = 0.0
        torch.equal(doubled, host[1:])
        torch.repeat_interleave(doubled, (doubled >= 0).long())

    with DeviceReads([device]) as reads:
        all_ways(host)
        assert reads.reads == []
        host[mask].sum().item()
        assert reads.reads == []
        all_ways(device)
    assert reads.reads == [
        *["aten::_local_scalar_dense"] * 3,
        "tolist",
        "cpu",
        "numpy",
        "aten::nonzero",
        "aten::index",
        "aten::index_put_",
        "aten::equal",
        "aten::repeat_interleave",
    ]


def test_numbers_come_back_as_they_were_in_one_read() -> None:
    values = [
        torch.tensor(2**53 - 1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(True),
        torch.tensor([0.1]),
        torch.tensor(-3, dtype=torch.int32),
        torch.tensor(float("nan")),
    ]
    with DeviceReads(values) as reads:
        found = read_numbers(values)
    assert reads.reads == ["tolist"]
    assert found[:5] == [2**53 - 1, 0.1, 1, torch.tensor(0.1).item(), -3]
    assert [type(value) for value in found] == [int, float, int, float, int, float]
    assert found[5] != found[5]
    assert read_numbers([]) == []


def test_totals_are_the_sums_of_their_parts_whenever_they_are_read() -> None:
    def total() -> Total:
        made = Total()
        for loss, most, count in ((0.5, 3.0, 2), (0.25, 1.0, 5)):
            sums = {"max_length": torch.tensor(most), "num_pairs": torch.tensor(count)}
            made.append(Part(torch.tensor(loss), sums, 10))
        return made

    late, early = total(), total()
    assert late.num_tokens == 20
    assert read_totals([late, early], torch.tensor(7.0)) == [7.0]
    assert read_totals([late]) == []
    expected = {"num_micro_batches": 2, "max_length": 3.0, "num_pairs": 7}
    assert (late.loss, late.sums) == (0.75, expected)
    both = Total(sums={})
    both.add(early)
    both.add(total())
    assert both.loss == 1.5
    assert both.sums == {"num_micro_batches": 4, "max_length": 3.0, "num_pairs": 14}
    replaced = total()
    replaced.loss = 9.0
    assert (replaced.loss, replaced.sums) == (9.0, expected)
