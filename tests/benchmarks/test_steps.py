"""Whole steps side by side: every comparison runs, on equal rows, and nothing wrong is timed."""

import importlib.util
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compare, compare_steps
from benchmarks.step_cases import (
    CASES,
    SHAPES,
    make_groups,
    make_tokenizer,
    read_groups,
    write_model,
    write_rows,
)
from benchmarks.step_trainers import TRAINERS, fastalign_sft
from benchmarks.step_work import useful_flops
from benchmarks.step_worker import Clock, Job
from fastalign.batch.packed import Group
from fastalign.data.load import load_examples

TINY = SHAPES["tiny"]
NUM_PAIRS = 3
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def run(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> dict[str, dict[str, Any]]:
    file = folder / "rows.json"
    line = f"compare {name} --model tiny --case small --rounds 1 --threads 1 --pairs {NUM_PAIRS}"
    line += f" --allocator default --json {file}"
    monkeypatch.setattr(sys, "argv", [*line.split(), *flags])
    compare.main()
    return {row["implementation"]: row for row in json.loads(file.read_text())}


def padded(groups: list[Group]) -> int:
    """Tokens of a rectangle with a row for each response."""
    lengths = [len(one.prompt_ids) + len(ids) for one in groups for ids in one.response_ids]
    return len(lengths) * max(lengths)


@needs_trl
def test_a_dpo_step_beside_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run("dpo-step", tmp_path, monkeypatch)
    assert rows.keys() == TRAINERS["dpo-step"].keys()
    groups = make_groups(CASES["small"], TINY.vocab_size, NUM_PAIRS, 2)
    useful = sum(group.num_tokens for group in groups)
    assert {name: row["tokens_computed"] for name, row in rows.items()} == {
        "trl": 2 * padded(groups),
        "trl, reference precomputed": padded(groups),
        "careful eager": padded(groups),
        "fastalign": useful,
        "fastalign, reference in the step": 2 * useful,
    }
    for row in rows.values():
        assert row["tokens_useful"] == useful
        assert row["loss"] == pytest.approx(rows["trl"]["loss"], rel=1e-4)
        assert abs(row["loss"] - math.log(2)) > 1e-2  # the reference is another model
        assert row["milliseconds"] > 0
        assert row["ratio_to_peer"] == rows["trl"]["milliseconds"] / row["milliseconds"]
        assert row["pass"] == "optimiser step"
    output = capsys.readouterr().out
    assert "like for like, small, tiny, float32: fastalign, reference in the step: " in output
    assert "trl, reference precomputed" in output


@needs_trl
@pytest.mark.parametrize("name", ["sft-step", "reward-step"])
def test_other_steps_beside_trl(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(name, tmp_path, monkeypatch)
    assert rows.keys() == TRAINERS[name].keys()
    assert rows["trl"]["ratio_to_peer"] == 1
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["trl"]["loss"], rel=1e-4)


def test_a_step_of_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(TINY, tmp_path / "pretrained", 5)
    job = make_job(tmp_path, "dpo-step", tmp_path / "pretrained")
    policy, reference, pretrained = (
        AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        for folder in (job.policy, job.reference, tmp_path / "pretrained")
    )
    torch.testing.assert_close(policy, pretrained, rtol=0, atol=0)
    assert (reference - pretrained).abs().max() > 0.1
    monkeypatch.setattr(compare_steps, "TRAINERS", {"dpo-step": {}})
    write_model(replace(TINY, vocab_size=300), tmp_path / "other", 5)
    with pytest.raises(SystemExit, match="expected vocab_size 256 of tiny, got 300"):
        run("dpo-step", tmp_path, monkeypatch, "--weights", str(tmp_path / "other"))


def test_only_the_peers_that_are_asked_for_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run("sft-step", tmp_path, monkeypatch, "--peer", "careful eager")
    assert list(rows) == ["careful eager", "fastalign"]


def test_a_step_by_the_number_of_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("answers-step", tmp_path, monkeypatch)
    assert list(rows) == [f"fastalign, {number} answers" for number in (2, 4, 8)]
    for number, row in zip((2, 4, 8), rows.values(), strict=True):
        groups = make_groups(CASES["small"], TINY.vocab_size, NUM_PAIRS, number)
        assert row["tokens_computed"] == sum(group.num_tokens for group in groups)
        # the same prompts and first responses, so that the number alone differs
        pairs = [Group(group.prompt_ids, group.response_ids[:2]) for group in groups]
        assert pairs == make_groups(CASES["small"], TINY.vocab_size, NUM_PAIRS, 2)


def make_job(folder: Path, name: str, weights: Path | None = None) -> Job:
    torch.set_num_threads(1)
    groups = make_groups(CASES["small"], TINY.vocab_size, 2, 1)
    arguments = Namespace(device="cpu", dtype=["float32"], rounds=1)
    return compare_steps.make_job(name, TINY, groups, folder, arguments, weights)


def wrong(job: Job, clock: Clock) -> None:
    """Our trainer, whose loss is said to be another."""
    watch = clock.watch

    def watch_and_lie() -> None:
        watch()
        honest = clock.first_loss
        clock.first_loss = lambda: 1.01 * honest()

    clock.watch = watch_and_lie  # type: ignore[method-assign]
    fastalign_sft(job, clock)


def test_a_peer_whose_loss_is_wrong_is_named_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainers = {"fastalign": fastalign_sft, "peer": wrong}
    rows = compare_steps.compare_case("sft-step", make_job(tmp_path, "sft-step"), "c", trainers, 1)
    assert [row.implementation for row in rows] == ["fastalign"]
    assert "not timed: the loss of peer is " in capsys.readouterr().out


def test_nothing_is_timed_where_our_loss_is_wrong(tmp_path: Path) -> None:
    job = make_job(tmp_path, "sft-step")
    with pytest.raises(SystemExit, match=r"the loss of fastalign is .*relative difference 1.0e-02"):
        compare_steps.compare_case("sft-step", job, "c", {"fastalign": wrong}, 1)


def broken(job: Job, clock: Clock) -> None:
    raise ValueError("no such thing")


def test_a_trainer_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    job = make_job(tmp_path, "sft-step")
    with pytest.raises(SystemExit, match=r"(?s)peer ended early:.*ValueError: no such thing"):
        compare_steps.measure_turns({"peer": (broken, job)}, {}, 1)


def test_rows_as_text_are_the_same_token_ids(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Which is it?"},
        {"role": "assistant", "content": "This one."},
        {"role": "user", "content": "Sure?"},
    ]
    lines = [
        {
            "prompt": turns[: 1 + 2 * (number % 2)],
            "chosen": [{"role": "assistant", "content": f"Yes, number {number}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for number in range(4)
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for groups in (
        make_groups(CASES["small"], 400, 4, 2),
        read_groups(chat, 400, 4),
    ):
        write_rows(groups, tmp_path / "rows.jsonl", "preference")
        data = load_examples(
            tmp_path / "rows.jsonl", "preference", make_tokenizer(400), max_length=200
        )
        assert list(data.groups) == groups


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"}) + "\n")
    with pytest.raises(ValueError, match="--data: expected at least 2 pairs"):
        read_groups(file, 400, 2)


def test_flops_are_those_of_the_weights_and_of_what_is_attended_to() -> None:
    group = Group([5, 6, 7], [[8, 9], [10, 11, 2]])
    # the prompt's 1 + 2 + 3; two tokens behind it, 4 + 5; three, 4 + 5 + 6
    attended = 30
    layers = AutoModelForCausalLM.from_config(TINY.config()).model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    attention = 4 * attended * TINY.hidden_size * TINY.num_layers
    forward = 2 * 8 * weights + 2 * 5 * TINY.hidden_size * TINY.vocab_size + attention
    assert useful_flops(TINY, [group], head=True) == 3 * forward
    head = 6 * 5 * TINY.hidden_size * TINY.vocab_size
    assert useful_flops(TINY, [group], head=False) == 3 * forward - head
