"""Reward data in TRL's formats: one comparison however it is written; bad rows in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastalign.cli.main import main
from fastalign.models.load import save_model
from fastalign.trainers import REWARD_LOSSES, RewardConfig, train_reward
from tests.small_runs import read_metrics, reward_config, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, make_tokenizer

TEXTS = [
    ("What is the best phone?", "The one that you like.", "no"),
    ("Is the screen dim?", "yes yes", "The menu is slow and small."),
    ("Is the camera good?", "It is excellent.", "maybe"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rows_as(form: str) -> list[dict[str, Any]]:
    """The same comparisons, as TRL's formats write them; each has a margin."""
    rows: list[dict[str, Any]] = []
    for number, (prompt, good, bad) in enumerate(TEXTS):
        if form == "plain":
            row: dict[str, Any] = {
                "prompt": prompt,
                "chosen": f" {good}",
                "rejected": f" {bad}",
            }
        elif form == "plain, implicit":
            row = {"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"}
        elif form == "chat":
            row = {"prompt": [user(prompt)], "chosen": [answer(good)], "rejected": [answer(bad)]}
        else:
            row = {
                "chosen": [user(prompt), answer(good)],
                "rejected": [user(prompt), answer(bad)],
            }
        rows.append({**row, "margin": 0.5 * number})
    return rows


def config_of(folder: Path, form: str, run: str) -> RewardConfig:
    tokenizer = make_tokenizer(chat_template=CHATML, adds_bos=not form.startswith("chat"))
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder / "llama")
    source = str(write_rows(folder / f"{run}.jsonl", rows_as(form)))
    config = reward_config(folder, run, max_steps=2, batch_size=3)
    return replace(
        config,
        loss=REWARD_LOSSES["bradley_terry"](),
        data=replace(config.data, train=source, eval=source),
    )


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_an_implicit_prompt_is_the_explicit_one(folder: Path, style: str) -> None:
    train_reward(config_of(folder, style, "explicit"))
    train_reward(config_of(folder, f"{style}, implicit", "implicit"))
    explicit, implicit = (read_metrics(folder / run) for run in ("explicit", "implicit"))
    assert explicit[0]["grad_norm"] > 0.1
    for one, other in zip(explicit, implicit, strict=True):
        for name in ("loss", "margin", "mean_reward", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    assert implicit[1]["eval_loss"] == pytest.approx(explicit[1]["eval_loss"], rel=1e-4)


def test_a_conversation_is_scored_as_transformers_scores_its_template(folder: Path) -> None:
    train_reward(config_of(folder, "chat", "run"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/model")
    scores = []
    for prompt, *answers in TEXTS:
        for text in answers:
            turns = [user(prompt), answer(text)]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            assert rendered.endswith("<|im_end|>")
            ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(model(ids).logits.item())
    pairs = [json.loads(t) for t in (folder / "run/eval/pairs.jsonl").read_text().splitlines()]
    found = [pair[side] for pair in pairs for side in ("first_reward", "second_reward")]
    assert found == pytest.approx(scores, rel=1e-4, abs=1e-5)


def test_margins_of_every_format_reach_the_loss(folder: Path) -> None:
    losses = []
    for with_margin in (True, False):
        config = config_of(folder, "chat, implicit", f"margin-{with_margin}")
        if not with_margin:
            plain = [{k: v for k, v in r.items() if k != "margin"} for r in rows_as("chat")]
            write_rows(Path(config.data.train), plain)
        train_reward(config)
        losses.append(read_metrics(Path(config.run.dir))[0]["loss"])
    assert losses[0] > losses[1] + 0.05


GOOD = rows_as("plain")[0]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"prompt": "a", "chosen": "b"}, "column 'rejected': missing"),
    "identical": ({**GOOD, "rejected": GOOD["chosen"]}, "identical to chosen"),
    "margin": ({**GOOD, "margin": "big"}, "column 'margin': expected a number, got 'big'"),
    "roles": (
        {"prompt": [answer("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
        "column 'prompt': expected the last message",
    ),
    "half-a-chat": ({"prompt": "a", "chosen": [answer("b")], "rejected": " c"}, "'rejected'"),
    "other-prompts": (
        {"chosen": [user("a"), answer("b")], "rejected": [user("x"), answer("b")]},
        "column 'rejected'",
    ),
    "tie": (
        {"prompt": "a", "response_a": " b", "response_b": " c", "label": "tie"},
        "a tie, which this loss does not support",
    ),
    "label": (
        {"prompt": "a", "response_a": " b", "response_b": " c", "label": 1},
        "column 'label': expected 'a', 'b' or 'tie', got the number 1",
    ),
    "votes": (
        {"prompt": "a", "response_a": " b", "response_b": " c", "label": "a", "votes": [3, 2]},
        "column 'votes': expected an object of counts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_the_run_before_it_starts_or_is_skipped(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, expected = BAD[name]
    source = write_rows(folder / "bad.jsonl", [GOOD, row])
    arguments = ["reward", "--model.path", str(folder / "llama"), "--data.train", str(source)]
    few = ["--train.max-steps", "1", "--train.batch-size", "1", "--train.device", "cpu"]
    assert main([*arguments, *few, "--run.dir", str(folder / "refused")]) == 2
    # In front of it, a progress bar of transformers'.
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fastalign reward: {source}:2: ")
    assert expected in error
    assert not (folder / "refused/model").exists()
    if name != "tie":  # a tie is no bad row: --data.ties says what becomes of it
        skip = ["--data.on-bad-row", "skip", "--run.dir", str(folder / "skipped")]
        assert main([*arguments, *few, *skip]) == 0
        assert "1 of 2 rows used (1 bad)" in capsys.readouterr().out
