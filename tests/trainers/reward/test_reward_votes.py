"""A reward model trained on vote shares: the loss by hand, its ties, and rows without votes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_reward_model
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import REWARD_LOSSES, RewardConfig, train_reward
from fastalign.trainers.reward import train as reward
from tests.small_runs import read_metrics, reward_config, write_rows


def voted_config(folder: Path, name: str, run: str = "run", **parameters: float) -> RewardConfig:
    """Every fourth row is a tie; each has votes, which do not always agree with its label."""
    config = reward_config(folder, run)
    path = Path(config.data.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["votes"] = {"a": number % 5, "b": 1 + number % 3, "tie": number % 2}
    write_rows(path, rows)
    return replace(config, loss=REWARD_LOSSES[name](votes=True, **parameters))


def step_loss(config: RewardConfig, indices: list[int]) -> tuple[float, list[float]]:
    """The loss of a step, and the differences of the rewards."""
    compute = make_compute(TrainConfig(device="cpu"))
    model = load_reward_model(config.model.path)
    model.score.weight.data *= 3
    data = load_data(config, config.data.train, load_tokenizer(config.model.path))
    pairs = reward.prepare_comparisons(config.loss, data, compute)
    metrics = reward.reward_gradient(model, config.loss, pairs, indices, compute).metrics()
    batch = pack([pairs.examples.groups[i] for i in indices])
    found = reward.response_reward(model, batch, Compute()).double()
    assert metrics["num_ties"] == sum(i % 4 == 3 for i in indices)
    return float(metrics["loss"]), (found[0::2] - found[1::2]).tolist()


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_the_loss_is_the_cross_entropy_of_the_shares(folder: Path, name: str) -> None:
    indices = [1, 3, 4, 7]
    loss, differences = step_loss(voted_config(folder, name), indices)
    expected = 0.0
    for number, d in zip(indices, differences, strict=True):
        votes = [number % 5, 1 + number % 3, number % 2]
        a, b, tie = (count / sum(votes) for count in votes)
        if name == "bradley_terry":
            a, b, tie = a + tie / 2, b + tie / 2, 0.0
            win, lose, ties = 1 / (1 + math.exp(-d)), 1 / (1 + math.exp(d)), 1.0
        elif name == "rao_kupper":
            win, lose = 1 / (1 + 3 * math.exp(-d)), 1 / (1 + 3 * math.exp(d))
            ties = 8 * win * lose
        else:
            win = 1 / (1 + math.exp(-d) + 2 * math.exp(-d / 2))
            lose, ties = win * math.exp(-d), win * 2 * math.exp(-d / 2)
        expected -= a * math.log(win) + b * math.log(lose) + tie * math.log(ties)
    assert loss == pytest.approx(expected / len(indices), rel=1e-5)


@pytest.mark.parametrize("name", ["bradley_terry", "davidson"])
def test_a_run_on_votes_keeps_its_ties_and_lowers_the_loss(folder: Path, name: str) -> None:
    config = voted_config(folder, name)
    train_reward(replace(config, train=replace(config.train, max_steps=25)))
    rows = read_metrics(folder / "run")
    assert rows[-1]["eval_num_pairs"] == 12
    assert rows[-1]["eval_num_ties"] == 3
    assert rows[-1]["eval_loss"] < 0.9 * rows[0]["loss"]


def test_a_row_without_votes_is_named(folder: Path) -> None:
    config = voted_config(folder, "bradley_terry")
    path = Path(config.data.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[4]["votes"]
    write_rows(path, rows)
    with pytest.raises(ValueError, match=r"compared\.jsonl:5: column 'votes': --loss\.votes: ex"):
        train_reward(config)
    judged = replace(config.data, train=str(folder / "pairs.jsonl"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: column 'votes': .*response_a.*got none"):
        train_reward(replace(config, data=judged))


def test_votes_that_are_not_used_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = voted_config(folder, "davidson")
    step_loss(config, [1])
    assert "not used" not in capsys.readouterr().out
    step_loss(replace(config, loss=REWARD_LOSSES["davidson"]()), [1])
    assert "votes of 12 rows are not used; --loss.votes trains on them" in capsys.readouterr().out
