"""A resumed run finds the inputs that it began with, or says which is another."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastalign.models.load import save_model
from fastalign.runs.config import RunConfig
from fastalign.runs.inputs import changed_inputs
from fastalign.trainers import RewardSourceConfig, train_ppo, train_reward, train_sft
from tests.runs.checkpoint.test_checkpoint_parts import rewrite
from tests.small_runs import ppo_config, reward_config, sft_config
from tests.tiny import tiny_reward_model
from tests.tokenizers import make_tokenizer

REWARD = """
def score(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""


@contextmanager
def changed(file: Path, change: Callable[[Path], None]) -> Iterator[None]:
    before = file.read_bytes()
    change(file)
    assert file.read_bytes() != before
    try:
        yield
    finally:
        file.write_bytes(before)


def other(old: str, new: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(file.read_text().replace(old, new)) and None


def keys(**values: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values)) and None


def other_weight(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, file, metadata)


def accepted(config: Any, *names: str) -> Any:
    return replace(config, run=replace(config.run, accept_changed=names))


def refusal(config: Any) -> str:
    """What a run is refused for, or the step that it came to."""
    try:
        return f"step {train_sft(config).step}"
    except ValueError as error:
        return str(error)


CONFIG = "llama/config.json"
ROPE = {"rope_type": "default", "rope_theta": 5e4}


def test_sft_finds_its_model_data_and_tokenizer_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "held_out.jsonl").write_bytes((folder / "texts.jsonl").read_bytes())

    def config(**options: Any) -> Any:
        made = sft_config(folder, "run", **options)
        return replace(made, data=replace(made.data, eval=str(folder / "held_out.jsonl")))

    train_sft(config(stop_at_step=2))
    resumed = config(resume=True, stop_at_step=3)
    begin = r"^run\.resume: the "
    for name, change, message, flag in [
        (
            CONFIG,
            keys(rms_norm_eps=1e-3),
            r"starting model \(rms_norm_eps of config\.json 1e-06, now 0\.001\)",
            "model",
        ),
        (CONFIG, keys(rope_parameters=ROPE), r"starting model \(rope_parameters\.rope_th", "model"),
        ("llama/model.safetensors", other_weight, "starting model", "model"),
        ("texts.jsonl", other("slow", "dim"), "training data", "data"),
        ("held_out.jsonl", other("slow", "dim"), "held-out data", "eval_data"),
        (
            "llama/tokenizer_config.json",
            keys(chat_template="{{ messages }}"),
            r"tokenizer \(chat template\)",
            "tokenizer",
        ),
    ]:
        end = rf".* is not what .*step-000002 was trained on; --run\.accept-changed {flag} goes on"
        with changed(folder / name, change):
            assert re.search(begin + message + end, refusal(resumed)), (name, message)
    capsys.readouterr()
    with changed(folder / CONFIG, keys(rms_norm_eps=1e-3)):
        train_sft(accepted(resumed, "model"))
        assert "goes on with another starting model (rms_norm_eps of" in capsys.readouterr().out
        train_sft(config(resume=True, stop_at_step=4))  # which is now the run's
    with pytest.raises(ValueError, match=r"rms_norm_eps of config\.json 0\.001, now 1e-06"):
        train_sft(resumed)
    train_sft(accepted(sft_config(folder, "run", resume=True), "model"))  # other held-out data


def test_a_reward_model_finds_its_configuration_again(folder: Path) -> None:
    train_reward(reward_config(folder, "run", stop_at_step=2))
    with (
        changed(folder / CONFIG, keys(rms_norm_eps=1e-3)),
        pytest.raises(ValueError, match=r"starting model \(rms_norm_eps of config"),
    ):
        train_reward(reward_config(folder, "run", resume=True))
    assert train_reward(reward_config(folder, "run", resume=True)).finished


def test_ppo_finds_its_rewards_and_demonstrations_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "length_reward.py").write_text(REWARD)
    save_model(tiny_reward_model("llama", vocab_size=320), make_tokenizer(), folder / "rm")

    def config(**options: Any) -> Any:
        made = ppo_config(folder, "run", **options)
        sources = ("length_reward:score", made.reward.sources[0], str(folder / "rm"))
        made = replace(made, reward=RewardSourceConfig(sources))
        return replace(made, ppo=replace(made.ppo, ptx_data=str(folder / "ptx.jsonl")))

    (folder / "ptx.jsonl").write_bytes((folder / "texts.jsonl").read_bytes())
    train_ppo(config(stop_at_step=1))
    # `config` writes the bag of words anew.
    resumed = config(resume=True)
    for name, change, message in [
        (
            "length_reward.py",
            other("len(text)", "len(text) + 1"),
            r"reward \(.*length_reward\.py\)",
        ),
        ("words.json", keys(bias=0.75), r"reward \(.*words\.json\)"),
        ("rm/model.safetensors", other_weight, r"value model, the reward \(rm: weights\) are"),
        ("rm/config.json", keys(rms_norm_eps=1e-3), r"value model \(rms_.*reward \(rm: rms_norm_"),
        ("ptx.jsonl", other("slow", "dim"), r"data of ppo\.ptx_data is not what"),
    ]:
        with (
            changed(folder / name, change),
            pytest.raises(ValueError, match=rf"^run\.resume: the .*{message}"),
        ):
            train_ppo(resumed)
    with changed(folder / "length_reward.py", other("len(text)", "len(text) + 1")):
        stop = replace(resumed, train=replace(resumed.train, stop_at_step=2))
        assert train_ppo(accepted(stop, "reward")).step == 2


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_has(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_sft(sft_config(folder, "run", stop_at_step=2))

    def as_before(tensors: dict[str, Any], state: dict[str, Any]) -> None:
        inputs = state.pop("inputs")
        state["data_fingerprint"] = inputs["data"]["content"]
        state |= {"base_fingerprint": None, "reference_fingerprint": None}

    rewrite(folder / "run/checkpoints/step-000002", as_before)
    resumed = sft_config(folder, "run", resume=True)
    with (
        changed(folder / "texts.jsonl", other("slow", "dim")),
        pytest.raises(ValueError, match=r"the training data is not what"),
    ):
        train_sft(resumed)
    assert train_sft(resumed).finished
    assert "is of an earlier version: only its data and frozen" in capsys.readouterr().out


def test_keys_that_another_release_of_transformers_adds_are_no_difference() -> None:
    old = {"inputs": {"model": {"a of config.json": 1, "gone of config.json": 2, "weights": "x"}}}
    new = {"model": {"a of config.json": 1, "new of config.json": 2, "weights": "x"}}
    assert changed_inputs(old, new) == {}
    new["model"]["weights"] = "y"
    assert changed_inputs(old, new).keys() == {"model"}


def test_only_inputs_of_a_resumed_run_are_accepted() -> None:
    with pytest.raises(ValueError, match=r"run\.accept_changed: expected run\.resume beside it"):
        RunConfig("run", accept_changed=("reward",))
    with pytest.raises(ValueError, match=r"run\.accept_changed: expected inputs among data, eval_"):
        RunConfig("run", resume=True, accept_changed=("weights",))  # type: ignore[arg-type]
