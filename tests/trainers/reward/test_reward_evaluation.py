"""What a finished reward model leaves in `eval/` and in its configuration, against transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastalign.evaluation.rewards import ModelReward
from fastalign.models.reward import reward_scale
from fastalign.trainers import REWARD_LOSSES, RewardConfig, train_reward
from tests.small_runs import reward_config, write_rows


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def evaluation(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / "eval/eval.json").read_text())


def served(folder: Path, run: str, rows: list[dict[str, Any]]) -> torch.Tensor:
    """transformers' own scores (N, 2) of response a and b, each a row of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / run / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / run / "model")
    scores = []
    with torch.no_grad():
        for row in rows:
            for side in ("response_a", "response_b"):
                text = row["prompt"] + row[side] + "</s>"
                scores.append(model(tokenizer(text, return_tensors="pt")["input_ids"]).logits)
    return torch.cat(scores).double().view(-1, 2)


def dropping(config: RewardConfig) -> RewardConfig:
    data = replace(config.data, ties="drop")
    return replace(config, loss=REWARD_LOSSES["bradley_terry"](), data=data)


def test_bradley_terry_is_judged_on_ties_too_by_their_share_in_training(folder: Path) -> None:
    config = dropping(reward_config(folder, "run", max_steps=6))
    train_reward(config)
    rows = rows_of(config.data.train)  # a is preferred, every fourth row is a tie
    scores = served(folder, "run", rows)
    found = evaluation(folder, "run")
    assert (found["tie_rate"], found["num_ties"], found["accuracy_count"]) == (0.25, 3, 9)
    expected = []
    for row, (a, b) in zip(rows, scores.tolist(), strict=True):
        win = 0.75 / (1 + math.exp(b - a))
        expected.append(math.log(0.25 if row["label"] == "tie" else win))
    assert found["log_likelihood"] == pytest.approx(sum(expected) / 12, rel=1e-4)
    assert found["log_likelihood_count"] == 12
    untied = [i for i, row in enumerate(rows) if row["label"] != "tie"]
    hits = (scores[untied, 0] > scores[untied, 1]).double()
    assert found["accuracy"] == pytest.approx(hits.mean().item())
    by_row = rows_of(folder / "run/eval/pairs.jsonl")
    assert [row["source"].rsplit(":", 1)[1] for row in by_row] == [str(n) for n in range(1, 13)]
    assert [row["tie"] for row in by_row] == [row["label"] == "tie" for row in rows]
    assert [row["log_likelihood"] for row in by_row] == pytest.approx(expected, rel=1e-4)
    assert [row["first_reward"] for row in by_row] == pytest.approx(scores[:, 0].tolist(), rel=1e-4)


def test_a_model_of_ties_is_judged_by_the_nu_that_is_saved(folder: Path) -> None:
    config = reward_config(folder, "run")
    train_reward(config)
    rows = rows_of(config.data.train)
    nu = json.loads((folder / "run/model/config.json").read_text())["tie_nu"]
    assert nu != 3.0
    expected = 0.0
    for row, (a, b) in zip(rows, served(folder, "run", rows).tolist(), strict=True):
        win, lose = 1 / (1 + nu * math.exp(b - a)), 1 / (1 + nu * math.exp(a - b))
        expected += math.log((nu**2 - 1) * win * lose if row["label"] == "tie" else win) / 12
    found = evaluation(folder, "run")
    assert found["log_likelihood"] == pytest.approx(expected, rel=1e-4)
    assert "tie_rate" not in found


def test_the_baselines_of_the_same_pairs_stand_beside_it(folder: Path) -> None:
    """Words that only winners have; the winner is the shorter one in every third row."""
    config = dropping(reward_config(folder, "run", max_steps=1))
    rows = []
    for number in range(12):
        good, bad = " excellent phone", " slow phone" + " menu" * (number % 3)
        sides = (bad, good) if number % 2 else (good, bad)
        rows.append({"response_a": sides[0], "response_b": sides[1], "label": "ab"[number % 2]})
    lines = [json.dumps({"prompt": f"The {n}", **row}) + "\n" for n, row in enumerate(rows)]
    Path(config.data.train).write_text("".join(lines))
    train_reward(config)
    found = evaluation(folder, "run")
    assert found["bag_of_words_accuracy"] == 1.0
    assert found["longer_wins_accuracy"] < 0.7
    lengths = [bin_["count"] for bin_ in found["length_bins"]]
    assert sum(lengths) == sum(b["count"] for b in found["calibration_bins"]) == 12


def test_a_run_that_stopped_is_judged_when_it_is_finished(folder: Path) -> None:
    straight = reward_config(folder, "straight")
    train_reward(straight)
    train_reward(reward_config(folder, "parts", stop_at_step=4))
    assert not (folder / "parts/eval").exists()
    train_reward(reward_config(folder, "parts", resume=True))
    for name in ("eval/eval.json", "eval/pairs.jsonl", "model/config.json"):
        first, second = folder / "straight" / name, folder / "parts" / name
        assert first.read_text() == second.read_text()


def test_without_held_out_pairs_nothing_is_judged(folder: Path) -> None:
    config = reward_config(folder, "run", max_steps=1)
    train_reward(replace(config, data=replace(config.data, eval=None)))
    assert (folder / "run/model").exists()
    assert not (folder / "run/eval").exists()


def test_held_out_ties_alone_are_refused_before_the_first_step(folder: Path) -> None:
    config = reward_config(folder, "run", max_steps=1)
    ties = [row for row in rows_of(config.data.train) if row["label"] == "tie"]
    only = str(write_rows(folder / "ties.jsonl", ties))
    with pytest.raises(ValueError, match=r"data\.eval: expected .* no tie, got 3 ties"):
        train_reward(replace(config, data=replace(config.data, eval=only)))
    assert not (folder / "run/model").exists()
    assert not (folder / "run/metrics.jsonl").exists()


def test_normalised_rewards_have_mean_0_and_deviation_1_and_raw_ones_are_served(
    folder: Path,
) -> None:
    config = reward_config(folder, "run")
    train_reward(config)
    rows = rows_of(config.data.train)
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    texts = [row[side] for row in rows for side in ("response_a", "response_b")]
    raw = ModelReward(folder / "run/model", raw=True)(prompts, texts)
    assert raw == pytest.approx(served(folder, "run", rows).flatten().tolist(), rel=1e-4)
    normalised = torch.tensor(ModelReward(folder / "run/model")(prompts, texts))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert abs(torch.tensor(raw).mean().item()) > 0.05
    assert normalised.argsort().tolist() == torch.tensor(raw).argsort().tolist()


def test_a_model_without_a_scale_stays_raw_and_a_bad_scale_is_refused(folder: Path) -> None:
    train_reward(reward_config(folder, "run", max_steps=1))
    path = folder / "run/model/config.json"
    config = json.loads(path.read_text())
    plain = {k: v for k, v in config.items() if k not in ("reward_mean", "reward_std")}
    path.write_text(json.dumps(plain))
    arguments = (["The phone"], [" good"])
    model = ModelReward(path.parent)
    assert model(*arguments) == ModelReward(path.parent, raw=True)(*arguments)
    for bad in ({"reward_std": 0.0}, {"reward_std": "1"}, {"reward_mean": None}):
        path.write_text(json.dumps({**config, **bad}))
        with pytest.raises(ValueError, match=r"config\.json: expected a finite reward_mean and a"):
            ModelReward(path.parent)


def test_equal_scores_are_only_shifted() -> None:
    from types import SimpleNamespace

    from fastalign.models.reward import set_reward_scale

    model = SimpleNamespace(config=SimpleNamespace())
    set_reward_scale(model, torch.tensor([2.0, 2.0, 2.0]))
    scale = reward_scale(model)
    assert scale.normalise(torch.tensor([2.0, 5.0])).tolist() == [0.0, 3.0]
