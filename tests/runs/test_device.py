"""Which device a rank computes on, on machines that are made up."""

import pytest
import torch

from fastalign.ranks.world import World
from fastalign.runs.open import device_of_rank


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_each_rank_of_a_machine_has_a_gpu_of_its_own() -> None:
    ranks = [World(rank, 4, rank % 2) for rank in range(4)]
    devices = [str(device_of_rank("auto", world)) for world in ranks]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert str(device_of_rank("cpu", ranks[3])) == "cpu"


def test_one_process_may_name_its_gpu_and_several_may_not() -> None:
    assert str(device_of_rank("cuda:1", World())) == "cuda:1"
    with pytest.raises(ValueError, match=r"train\.device: .* each has its own; got cuda:1"):
        device_of_rank("cuda:1", World(0, 2, 0))
    with pytest.raises(ValueError, match=r"rank 2 is number 2 on its machine, which has 2 GPUs"):
        device_of_rank("cuda", World(2, 3, 2))
