"""AdamW with states of 8 bits: the same update, a quarter of the memory, exact resumption."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastalign.runs.accumulate import Total
from fastalign.runs.config import OptimConfig
from fastalign.runs.state import TrainState, make_optimizer, optimiser_step
from fastalign.trainers import train_dpo, train_sft
from tests.small_runs import MakeConfig, dpo_config, read_metrics, saved_tensors, sft_config

CONFIG = OptimConfig(lr=3e-3, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, schedule="constant")


def low_bit(config: Any) -> Any:
    return replace(config, optim=replace(config.optim, states="8bit"))


def model_of_mixed_sizes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 64), nn.LayerNorm(64), nn.Linear(64, 3))


def train(model: nn.Module, config: OptimConfig, num_steps: int) -> TrainState:
    """Some steps on random data; the learning rate is another one in each."""
    state = TrainState(model, make_optimizer(model, config))
    draw = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        model(torch.randn(16, 80, generator=draw)).square().sum().backward()
        optimiser_step(state, [Total()], replace(config, warmup_steps=100), 1000)
        state.step += 1
    return state


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def tensors(values: Any) -> list[Tensor]:
    """All tensors of nested dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [tensor for key in values for tensor in tensors(values[key])]
    return []


def test_the_first_step_is_float32_adamws_and_later_ones_are_near() -> None:
    for num_steps, allowed in ((1, 1e-6), (20, 0.02)):
        start = flat(model_of_mixed_sizes())
        moved = []
        for states in ("float32", "8bit"):
            model = model_of_mixed_sizes()
            train(model, replace(CONFIG, states=states), num_steps)  # type: ignore[arg-type]
            moved.append(flat(model) - start)
        assert float((moved[1] - moved[0]).norm()) < allowed * float(moved[0].norm())


def test_large_tensors_have_states_of_8_bits_and_small_ones_float32() -> None:
    model = model_of_mixed_sizes()
    optimizer = train(model, replace(CONFIG, states="8bit"), 1).optimizer
    found = {tuple(p.shape): optimizer.state[p]["state1"].dtype for p in model.parameters()}
    assert found[64, 80] == torch.uint8
    assert found[3, 64] == found[64,] == torch.float32
    for group, decay, dimensions in zip(optimizer.param_groups, (0.3, 0.0), (2, 1), strict=True):
        assert group["weight_decay"] == decay
        assert {p.ndim for p in group["params"]} == {dimensions}
        assert (group["betas"], group["eps"]) == (CONFIG.betas, CONFIG.eps)


def test_a_step_that_is_not_finite_changes_no_weight_and_no_state() -> None:
    model = model_of_mixed_sizes()
    state = train(model, replace(CONFIG, states="8bit"), 3)
    before = [flat(model), *(t.clone() for t in tensors(state.optimizer.state_dict()["state"]))]
    model(torch.randn(4, 80)).sum().backward()
    model[0].weight.grad[5, 3] = torch.inf  # type: ignore[index,union-attr]
    assert optimiser_step(state, [Total(1.0)], CONFIG, 1000)["skipped"] == 1
    after = [flat(model), *tensors(state.optimizer.state_dict()["state"])]
    assert len(after) > 10
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("make", "run"), [(sft_config, train_sft), (dpo_config, train_dpo)], ids=["sft", "dpo"]
)
def test_a_resumed_run_equals_a_straight_one(folder: Path, make: MakeConfig, run: Any) -> None:
    run(low_bit(make(folder, "straight")))
    run(low_bit(make(folder, "stopped", stop_at_step=3)))
    run(low_bit(make(folder, "stopped", resume=True)))
    runs = [folder / "straight", folder / "stopped"]
    first, second = ([row["loss"] for row in read_metrics(path)] for path in runs)
    assert first == second
    weights, others = (load_file(path / "model/model.safetensors") for path in runs)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    found, other = (saved_tensors(path / "checkpoints/step-000008") for path in runs)
    averages = {name: value for name, value in found.items() if name.startswith("optimizer.")}
    assert {t.dtype for t in averages.values()} >= {torch.uint8, torch.float32}
    assert found.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in found.items())
    with pytest.raises(ValueError, match=r"optim\.states \(8bit, now float32\)"):
        run(make(folder, "stopped", resume=True))


def test_without_bitsandbytes_one_line_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"8bit needs bitsandbytes: pip install 'fastalign\[low"):
        train_sft(low_bit(sft_config(folder, "run")))
    assert not (folder / "run").exists()
    with pytest.raises(ValueError, match=r"optim\.states: expected float32 or 8bit, got '4bit'"):
        replace(CONFIG, states="4bit")  # type: ignore[arg-type]
