"""Numbers that are not finite end a command in one line: none is written, and no model is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastalign.cli.main import main
from fastalign.trainers import train_ppo, train_sft
from tests.small_runs import ppo_config, sft_config


def overflow(folder: Path) -> None:
    """Make weights finite, and the logits of one token's continuations not."""
    file = folder / "llama/model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"][:] = 1e38
    save_file(weights, file, metadata)
    config = folder / "llama/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-6}))


@pytest.fixture
def not_finite_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on two tokens passes, and other tokens give NaN."""
    monkeypatch.setattr("fastalign.models.load.check_head", lambda model: None)


@pytest.mark.usefixtures("not_finite_after_loading")
def test_nothing_is_written_of_a_model_whose_logits_are_not_finite(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overflow(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "The menu"}\n')
    out = folder / "out.jsonl"
    model = ("--model.path", str(folder / "llama"), "--out", str(out))
    sampling = ("--sampling.max-new-tokens", "4")
    prompts = ("--data.prompts", str(folder / "prompts.jsonl"))
    assert main(["generate", *model, *prompts, *sampling]) == 2
    assert "log-probs of sampled tokens: " in capsys.readouterr().err
    pairs = ("--data.pairs", str(folder / "pairs.jsonl"))
    reference = ("--reference.path", str(folder / "llama"))
    assert main(["eval", *model, *pairs, *reference]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastalign eval: log-probs under ")
    assert "are not finite; the model computes NaN" in last
    assert not out.exists()


@pytest.mark.usefixtures("not_finite_after_loading")
def test_rollouts_that_are_not_finite_end_the_run(folder: Path) -> None:
    overflow(folder)
    with pytest.raises(ValueError, match="are not finite"):
        train_ppo(ppo_config(folder, "run"))
    assert not (folder / "run/model").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_skipped_steps_alone_writes_no_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr("fastalign.runs.state.clip_gradient", lambda *_: torch.tensor(math.nan))
    with pytest.raises(ValueError, match=rf"every step of the run, {steps} in all, had"):
        train_sft(sft_config(folder, "run", max_steps=steps))
    assert not (folder / "run/model").exists()


def test_an_update_that_is_not_finite_is_never_saved(folder: Path) -> None:
    config = sft_config(folder, "run", max_steps=1)
    optim = replace(config.optim, lr=1e38, warmup_steps=0, weight_decay=1e30)
    with pytest.raises(ValueError, match=r"step 1 is not saved: .* holds a non-finite weight"):
        train_sft(replace(config, optim=optim))
    assert not (folder / "run/model").exists()
    assert not list((folder / "run/checkpoints").glob("step-*"))
