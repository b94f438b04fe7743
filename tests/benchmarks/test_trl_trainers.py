"""The benchmark beside TRL's trainers: every trainer computes the loss that TRL's does."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from benchmarks.measure import CLEAR_REFS
from benchmarks.step_cases import CASES, SHAPES, make_groups, write_model
from benchmarks.trl_trainers import TRAINERS, serve

# TRL and what it imports warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc"),
]


class Requests:
    """The end of a connection that asks for one call."""

    def __init__(self) -> None:
        self._left = [True, False]
        self.answers: list[Any] = []
        self.recv, self.send = lambda: self._left.pop(0), self.answers.append


@pytest.mark.parametrize("name", TRAINERS)
def test_equal_losses(name: str, tmp_path: Path) -> None:
    write_model(SHAPES["tiny"], tmp_path / "model", 0)
    groups = make_groups(CASES["small"], SHAPES["tiny"].vocab_size, 2, 2)
    losses = []
    for ours in (False, True):
        requests: Any = Requests()
        serve((name, ours, tmp_path, groups, 2), requests)
        ((loss, seconds, peak),) = requests.answers
        assert seconds > 0
        assert peak >= 0
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
