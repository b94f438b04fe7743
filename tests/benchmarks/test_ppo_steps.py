"""PPO iterations side by side: every trainer does its work on the same prompts, and is checked."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, compare_ppo, ppo_trainers
from benchmarks.step_cases import PPO_CASES, SHAPES
from benchmarks.step_work import Product, products_of_iteration, useful_tokens

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@needs_trl
def test_an_iteration_beside_trl_and_a_careful_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GAE without the old TRL, which is another environment's; GRPO with the one that is here."""
    file = tmp_path / "rows.json"
    line = "compare ppo-step --model tiny --rounds 1 --threads 1 --allocator default"
    cases = ["--case", "gae-small", "--case", "grpo-small"]
    monkeypatch.setattr(sys, "argv", [*line.split(), *cases, "--json", str(file)])
    compare.main()
    rows = {(row["case"], row["implementation"]): row for row in json.loads(file.read_text())}
    shared = ["fastalign, share-policy", "fastalign, one-base"]
    ours = [("gae-small", name) for name in ("careful eager", "fastalign", *shared)]
    grpo = [("grpo-small", name) for name in ("trl", "careful eager", "fastalign")]
    assert list(rows) == [*ours, *grpo]
    assert "gae-small, without trl: --trl-ppo names no folder" in capsys.readouterr().out
    for row in rows.values():
        assert row["pass"] == "PPO iteration"
        assert row["allocator"] == "default"
        assert row["milliseconds"] > 0
    for case in ("gae-small", "grpo-small"):
        # a prompt is computed once for its samples, and no row is padded
        computed = [rows[case, name]["tokens_computed"] for name in ("fastalign", "careful eager")]
        assert computed[0] < computed[1]
    # values from the layers of the policy: a forward less before the updates, and in each epoch
    computed = [rows["gae-small", name]["tokens_computed"] for name in ("fastalign", *shared)]
    assert computed[1] < computed[0] == computed[2]


def test_samples_of_another_policy_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = type("A", (), {"device": "cpu", "dtype": ["float32"], "rounds": 1})()
    job = compare_ppo.make_job(PPO_CASES["grpo-small"], SHAPES["tiny"], tmp_path, arguments)
    monkeypatch.setattr(compare_ppo, "eager_nats", lambda job: (100.0, 0.1))
    trainers = {"careful eager": ppo_trainers.careful_ppo}
    assert compare_ppo.compare_case(job, trainers, None, 1) == []
    assert "not timed: the loss of careful eager is" in capsys.readouterr().out


def test_products_of_an_iteration_are_those_of_its_passes(tmp_path: Path) -> None:
    arguments = type("A", (), {"device": "cpu", "dtype": ["float32"], "rounds": 1})()
    case, shape = PPO_CASES["gae-small"], SHAPES["tiny"]
    job = compare_ppo.make_job(case, shape, tmp_path, arguments)
    work = products_of_iteration(job)
    prompts = sum(len(group.prompt_ids) for group in job.groups)
    sampled, tokens = case.num_prompts * case.new_tokens, useful_tokens(job.groups)
    assert tokens == prompts + sampled

    def flops(work: list[Product]) -> int:
        return sum(
            2 * p.rows * p.inputs * p.outputs * p.repeats * (1 + 2 * p.backward) for p in work
        )

    blocks = sum(rows * columns for rows, columns in shape.products())
    head = shape.hidden_size * shape.vocab_size
    # once to sample; before the updates policy, reference, values and scores; three times an update
    models = 4 + case.epochs * 2 * 3
    heads = 2 + case.epochs * 3
    expected = (prompts + sampled + models * tokens) * blocks + (1 + heads) * sampled * head
    assert flops(work) == 2 * expected
