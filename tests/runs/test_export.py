"""A checkpoint in transformers' layout, while its run is not finished."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import rank_processes as ranks
from tests.ranks.test_ranks import FSDP, TRAINERS, lora
from tests.small_runs import saved_tensors

CASES = [(name, None) for name in TRAINERS] + [("dpo", lora)]


def of_run(config: Any, folder: Path, change: Callable[[Any], Any] | None, save_dtype: str) -> Any:
    config = config if change is None else change(config)
    run = replace(config.run, resume=True, export=str(folder / "exported"))
    return replace(config, run=run, model=replace(config.model, save_dtype=save_dtype))


@pytest.mark.parametrize(("trainer", "change"), CASES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_checkpoint_is_exported(
    folder: Path, trainer: str, change: Callable[[Any], Any] | None, num_ranks: int
) -> None:
    make, train = TRAINERS[trainer]
    stopped = make(folder, "run", stop_at_step=3)
    train(stopped if change is None else change(stopped))
    dtype = torch.float32 if num_ranks == 1 else torch.bfloat16
    config = of_run(make(folder, "run"), folder, change, "auto" if num_ranks == 1 else "bfloat16")
    if num_ranks == 1:
        assert not train(config).finished
    else:
        ranks.run(num_ranks, folder / "logs", train, replace(config, parallel=FSDP))
    kept = saved_tensors(folder / "run/checkpoints/step-000003", "model.")
    exported = folder / "exported"
    assert not (folder / "run/model").exists()
    if change is not None:
        adapter = load_file(exported / "adapter/adapter_model.safetensors")
        names = {name.replace(".default", ""): value for name, value in kept.items()}
        assert adapter.keys() == {f"base_model.model.{name}" for name in names}
        assert all(torch.equal(adapter[f"base_model.model.{n}"], v) for n, v in names.items())
    kind = AutoModelForSequenceClassification if trainer == "reward" else AutoModelForCausalLM
    opened = kind.from_pretrained(exported / "model").state_dict()
    written = [load_file(file) for file in exported.glob("*/model.safetensors")]
    assert len(written) == 1 + (trainer == "ppo")
    assert {value.dtype for state in written for value in state.values()} == {dtype}
    assert {value.dtype for value in opened.values()} == {dtype}
    for name, value in opened.items():
        expected = kept.get(name, kept.get(f"policy.{name}"))
        if change is None:
            assert torch.equal(value, expected.to(dtype)), name
    assert (exported / "value").exists() == (trainer == "ppo")


def test_export_needs_a_run_to_resume(folder: Path) -> None:
    config = TRAINERS["sft"][0](folder, "run")
    with pytest.raises(ValueError, match=r"run\.export: expected run\.resume beside it"):
        replace(config.run, export="somewhere")
