"""What a checkpoint lacks, or holds beside, is refused by name; parts may start afresh."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastalign.runs.checkpoint.restore import fault_of, restore, restore_random
from fastalign.runs.config import RunConfig
from fastalign.trainers import train_sft
from fastalign.written_files import entry_of
from tests.runs.checkpoint.checkpoint_cases import make_state, saved, trained
from tests.small_runs import saved_tensors, sft_config


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Makes a checkpoint without a fault that holds other things."""
    (shard,) = checkpoint.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors, state = load_file(shard), json.loads((checkpoint / "state.json").read_text())
    change(tensors, state)
    placed = {name: {"saved_offsets": [0] * value.ndim} for name, value in tensors.items()}
    save_file(tensors, shard, metadata | {"DCP_SHARDING_INFO": json.dumps(placed)})
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = {
        path.name: entry_of(path) for path in checkpoint.iterdir() if path.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert fault_of(checkpoint) is None


def without(prefix: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], state: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def foreign(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], state: dict[str, Any]) -> None:
        tensors[name] = torch.zeros(7)
        state["tensors"].append(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("optimizer.2.weight"),
            r"has no optimizer state of 2\.weight \(exp_avg\); --run\.start-afresh optimizer "
            "begins that part anew",
        ),
        (without("random."), r"has no random state of rank0\.cpu; --run\.start-afresh random"),
        (without("model.0.bias"), r"has no weight of 0\.bias, which its state\.json lists"),
        (without("reference.0"), r"has no reference weight of 0\.bias, which its state"),
        (foreign("model.3.bias"), r"holds weight of 3\.bias, which the run does not train"),
        (foreign("optimizer.3.bias.step"), r"holds optimizer state of 3\.bias \(step\), which"),
        (
            lambda tensors, state: tensors.update(extra=torch.zeros(1)),
            r"holds extra, which its state\.json does not list",
        ),
        (
            lambda tensors, state: tensors.update({"model.0.bias": torch.zeros(8)}),
            r"holds weight of 0\.bias as \(8,\), expected \(7,\)",
        ),
        (
            lambda tensors, state: tensors.update({"optimizer.0.bias.exp_avg": torch.zeros(8)}),
            r"holds optimizer state of 0\.bias \(exp_avg\) as \(8,\), expected \(7,\)",
        ),
        (
            lambda tensors, state: tensors.update({"reference.0.bias": torch.zeros(8)}),
            r"holds reference weight of 0\.bias as \(8,\), expected \(7,\)",
        ),
        (lambda tensors, state: state.pop("num_tokens"), r"state\.json has no num_tokens"),
        (
            lambda tensors, state: state["optimizer"]["param_groups"].pop(),
            "the optimizer's groups of weights are not the checkpoint's",
        ),
        (lambda tensors, state: state.update(format=1), "expected checkpoint format 2, got 1"),
    ],
)
def test_missing_and_foreign_parts_are_refused_by_name(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = saved(tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"^run\.resume: .*{message}"):
        restore(path, make_state(seed=1))


def test_a_weight_that_the_checkpoint_never_had_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = make_state(seed=1)
    state.model.append(nn.Linear(1, 2))
    with pytest.raises(ValueError, match=r"has no weight of 3\.weight, which the model has"):
        restore(path, state)


def test_parts_that_start_afresh_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_state = trained()
    path = saved(tmp_path, saved_state)
    for name in ("optimizer", "random", "kept", "grad_norms", "rollouts"):
        state = make_state(seed=1)
        restore(path, state, afresh=(name,))
        assert f"starts afresh (run.start_afresh): {name}\n" in capsys.readouterr().out
        assert state.step == saved_state.step
        assert torch.equal(state.model[0].bias, saved_state.model[0].bias)
        assert bool(state.optimizer.state) == (name != "optimizer")
        assert (state.kept == {}) == (name == "kept")
        assert (state.grad_norms == []) == (name == "grad_norms")
        assert (state.rollouts == {}) == (name == "rollouts")
        as_saved = torch.equal(torch.get_rng_state(), saved_tensors(path)["random.rank0.cpu"])
        assert as_saved == (name != "random")
    rewrite(path, without("optimizer."))
    rewrite(path, lambda tensors, state: state["optimizer"]["param_groups"].pop())
    restore(path, make_state(seed=1), afresh=("optimizer",))
    rewrite(path, without("random."))
    draws = []
    for seed in (1, 1, 2):
        restore(path, make_state(seed=1), seed=seed, afresh=("optimizer", "random"))
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] != draws[2]


def test_random_states_that_begin_anew_are_of_the_run_the_rank_and_the_step() -> None:
    draws = set()
    for step, seed, rank in [(3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1), (3, 0, 0)]:
        restore_random({}, step, seed, rank)
        draws.add(float(torch.rand(())))
    assert len(draws) == 4


def test_a_run_goes_on_with_a_part_begun_anew(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_sft(sft_config(folder, "run", stop_at_step=3))
    config = sft_config(folder, "run", resume=True)
    run = replace(config.run, start_afresh=("optimizer", "random"))
    assert train_sft(replace(config, run=run)).finished
    assert "starts afresh (run.start_afresh): optimizer, random\n" in capsys.readouterr().out
    steps = saved_tensors(folder / "run/checkpoints/step-000008", "optimizer.lm_head.weight.")
    assert float(steps["step"]) == 5


def test_a_new_run_has_no_parts_to_start_afresh_and_no_others_than_those() -> None:
    with pytest.raises(ValueError, match=r"run\.start_afresh: expected run\.resume beside it"):
        RunConfig("run", start_afresh=("optimizer",))
    with pytest.raises(ValueError, match=r"run\.start_afresh: expected parts among optimizer, ran"):
        RunConfig("run", resume=True, start_afresh=("weights",))  # type: ignore[arg-type]
