"""Each model that a run writes has a card: true, the same after a resume, and without paths."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from fastalign import trainers
from fastalign.runs.config import LoraConfig
from fastalign.written_files import MANIFEST
from tests.small_runs import dpo_config, folder, ppo_config, read_metrics, reward_config

__all__ = ["folder"]

BASE_CARD = "---\nlicense: apache-2.0\nbase_model: owner/first\ntags: [x]\n---\nIts `text`.\n"


def card_of(model: Path) -> ModelCard:
    assert "README.md" in json.loads((model / MANIFEST).read_text())["files"]
    return ModelCard((model / "README.md").read_text())


def loaded_as_shown(card: ModelCard, model: Path, base: Path) -> Any:
    """The model that the card's Python opens, on this machine."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    shown_base = "/".join(base.parts[-2:])  # a card has no private path
    names: dict[str, Any] = {}
    exec(
        code.replace('"FOLDER"', repr(str(model))).replace(f'"{shown_base}"', repr(str(base))),
        names,
    )
    assert names["tokenizer"].eos_token
    return names["model"]


def rows_of(card: ModelCard) -> list[tuple[str, str]]:
    return re.findall(r"^\| `([^`]*)` \| `?([^`|]*?)`? \|$", card.text, re.MULTILINE)


def test_a_card_says_what_was_trained_and_a_resume_does_not_change_it(folder: Path) -> None:
    (folder / "llama/README.md").write_text(BASE_CARD)
    config = dpo_config(folder, "straight", max_steps=2, eval_every=1)
    config = replace(config, loss=trainers.LOSSES["ipo_sum"](beta=0.25))
    trainers.train_dpo(config)
    card, last = card_of(folder / "straight/model"), read_metrics(folder / "straight")[-1]
    assert card.data.to_dict() == {
        "base_model": "owner/first",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["fastalign", "dpo"],
    }
    assert "loss ipo_sum" in card.text
    assert str(folder) not in card.content
    rows = rows_of(card)
    measured = [(name, f"{last[name]:.6g}") for name in ("loss", "eval_loss")]
    changed = [("loss.beta", "0.25"), ("optim.lr", "0.001")]
    assert {*measured, *changed} <= {*rows}
    assert card.text.index("`eval_loss`") < card.text.index("| `loss` |")
    assert not {"run.dir", "model.path", "optim.schedule", "step_seconds"} & {*dict(rows)}
    state = json.loads((folder / "straight/checkpoints/step-000002/state.json").read_text())
    assert state["inputs"]["data"]["content"] in card.text

    stopped = replace(config.run, dir=str(folder / "stopped"))
    trainers.train_dpo(replace(config, run=stopped, train=replace(config.train, stop_at_step=1)))
    with (folder / "stopped/metrics.jsonl").open("a") as file:  # of a step that was not saved
        file.write('{"step": 2, "loss": 9.0, "eval_loss": 9.0}\n')
    export = replace(stopped, resume=True, export=str(folder / "out"))
    trainers.train_dpo(replace(config, run=export))
    early = card_of(folder / "out/model")
    assert "Steps: 1 of 2, exported" in early.text
    first = read_metrics(folder / "stopped")[0]
    assert ("eval_loss", f"{first['eval_loss']:.6g}") in rows_of(early)
    assert first["eval_loss"] != last["eval_loss"]
    for _ in range(2):  # the second call has no step to take
        trainers.train_dpo(replace(config, run=replace(stopped, resume=True)))
        assert card_of(folder / "stopped/model").content == card.content
    loaded_as_shown(card, folder / "straight/model", folder / "llama")


def test_an_adapter_s_card_opens_it_on_its_base(folder: Path) -> None:
    config = dpo_config(folder, "run", max_steps=1)
    trainers.train_dpo(replace(config, model=replace(config.model, lora=LoraConfig(rank=2))))
    card = card_of(folder / "run/adapter")
    assert (card.data.library_name, card.data.license) == ("peft", None)
    assert ("model.lora.rank", "2") in rows_of(card)
    assert "Licence: not known" in card.text
    adapted = loaded_as_shown(card, folder / "run/adapter", folder / "llama")
    merged = loaded_as_shown(card_of(folder / "run/model"), folder / "run/model", folder / "llama")
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)


def test_reward_and_value_models_have_cards_of_their_own(folder: Path) -> None:
    trainers.train_reward(reward_config(folder, "reward", max_steps=1))
    reward = card_of(folder / "reward/model")
    assert "# Reward model trained with fastalign reward" in reward.text
    assert "loss rao_kupper" in reward.text
    model = loaded_as_shown(reward, folder / "reward/model", folder / "llama")
    assert model(torch.tensor([[1, 5, 9]])).logits.shape == (1, 1)
    config = ppo_config(folder, "ppo", max_steps=1)
    value = replace(config.value, path=str(folder / "reward/model"))
    trainers.train_ppo(replace(config, value=value))
    card = card_of(folder / "ppo/value")
    assert "# Value model trained with fastalign ppo" in card.text
    assert "Base: `reward/model`" in card.text
    assert "Base: `reward/model`" not in card_of(folder / "ppo/model").text
    assert "ppo.advantage gae" in card.text


def test_a_damaged_card_or_table_of_metrics_costs_no_model(folder: Path) -> None:
    (folder / "llama/README.md").write_bytes(b"---\nlicense: [\xff\n---\n")
    config = dpo_config(folder, "run", max_steps=1)
    trainers.train_dpo(config)
    (folder / "run/metrics.jsonl").write_text("no JSON\n" * 1000)
    trainers.train_dpo(
        replace(config, run=replace(config.run, resume=True, export=str(folder / "o")))
    )
    card = card_of(folder / "o/model")
    assert "metrics.jsonl could not be read" in card.text
    assert card.data.license is None
