"""What the estimate's tracker counts, and that its work grows with the operations alone."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from fastalign.batch.packed import Group, pack
from fastalign.compute import Compute
from fastalign.estimate.memory import fake_mode, move_to_fake, peak_of
from fastalign.estimate.tracker import BUFFER, GRADIENT, OTHER, PARAMETER, PeakTracker
from fastalign.models.lora import add_adapter
from tests.tiny import SETTINGS, tiny_model

CPU = torch.device("cpu")


def test_kinds_at_the_peak_by_hand() -> None:
    """Of x (8, 16) -> W (32, 16) -> sum, 4 KiB are alive beside all but gradients.

    W transposed, which the backward needs for the gradient of x, is W itself.
    """
    layer = nn.Linear(16, 32, bias=False)
    layer.register_buffer("mask", torch.ones(6))
    move_to_fake(layer, CPU)
    with fake_mode(CPU), PeakTracker(layer, CPU) as tracker:
        x = torch.empty(8, 16, requires_grad=True)
        y = layer(x)
        temporary = torch.empty(1024)
        view = temporary[:2]
        del temporary
        assert tracker.alive[OTHER] == 4 * (8 * 16 + 8 * 32 + 1024)
        del view
        assert tracker.alive[OTHER] == 4 * (8 * 16 + 8 * 32)
        y.sum().backward()
        assert tracker.alive[GRADIENT] == 4 * 16 * 32
        layer.zero_grad(set_to_none=True)
        assert tracker.alive[GRADIENT] == 0
    assert tracker.peak[PARAMETER] == 4 * 16 * 32
    assert tracker.peak[BUFFER] == 4 * 6
    assert tracker.peak[OTHER] == 4 * (8 * 16 + 8 * 32 + 1024)
    assert tracker.peak[GRADIENT] == 0


def calls_of_peak(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the Python calls of the peak of a model with adapters."""
    settings = {**SETTINGS["llama"], "num_hidden_layers": num_layers}
    monkeypatch.setitem(SETTINGS, "llama", settings)
    model = tiny_model("llama")
    add_adapter(model, rank=2, alpha=4.0, targets=("all-linear",))
    move_to_fake(model, CPU)
    batch = pack([Group([1, 2, 3], [[4, 5]])], share_prompts=True)
    compute = Compute()
    peak_of(model, batch, compute, backwards=1)  # fills the caches of fake tensors
    count = 0

    def counts(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counts)
    try:
        peak_of(model, batch, compute, backwards=1)
    finally:
        sys.setprofile(None)
    return count


def test_work_is_proportional_to_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that goes through all modules after each operation takes the square."""
    two, four, eight = (calls_of_peak(depth, monkeypatch) for depth in (2, 4, 8))
    of_layer = (four - two) / 2
    assert (eight - four) / 4 == pytest.approx(of_layer, rel=0.02)
