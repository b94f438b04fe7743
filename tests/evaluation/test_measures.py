"""Hand-worked measures, rewards by name, and log-probs that equal a plain forward's."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.evaluation import (
    BagOfWordsReward,
    apply_reward,
    estimate,
    estimate_of_groups,
    load_reward,
    mean_margin,
    preference_accuracy,
    sampled_kl,
)
from fastalign.models import save_model, sequence_logprobs
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer


def test_estimates() -> None:
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3.0
    assert found.standard_error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert found.count == 4
    assert math.isnan(estimate([1.0]).standard_error)
    grouped = estimate_of_groups([[1.0, 3.0], [4.0, 8.0]])
    assert (grouped.mean, grouped.count) == (4.0, 2)
    assert grouped.standard_error == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_accuracy_leaves_ties_out_and_halves_equal_rewards() -> None:
    policy = [
        torch.tensor(pair) for pair in ([-1.0, -5.0], [-4.0, -3.0], [-2.0, -2.0], [0.0, -9.0])
    ]
    reference = [torch.tensor([-2.0, -4.0])] * 2 + [torch.tensor([-3.0, -3.0])] * 2
    # ratios: (1, -1) hit; (-2, 1) miss; (1, 1) half; the last is a tie
    found = preference_accuracy(policy, reference, [False, False, False, True])
    assert (found.mean, found.count) == (0.5, 3)
    with pytest.raises(ValueError, match="not a tie"):
        preference_accuracy(policy[:1], reference[:1], [True])


def test_margin_and_kl() -> None:
    policy = [torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -3.0])]
    reference = [torch.tensor([-2.0, -4.0]), torch.tensor([-2.0, -4.0])]
    assert mean_margin(policy, reference, beta=0.5).mean == pytest.approx((0.5 * 2 - 0.5 * 3) / 2)
    assert sampled_kl(policy, reference).mean == pytest.approx((0.0 - 0.5) / 2)


def test_sequence_log_probs_equal_a_plain_forward_in_the_callers_order() -> None:
    model = tiny_model("qwen3")
    groups = [Group([1, 4], [[5, 6], [7]]), Group([1], [[9, 9, 9]]), Group([3, 3, 3], [[8], [2]])]
    for tokens in (1, 1000):
        found = sequence_logprobs(model, groups, Compute(tokens_per_batch=tokens))
        for group, values in zip(groups, found, strict=True):
            for response, value in zip(group.response_ids, values, strict=True):
                ids = torch.tensor([[*group.prompt_ids, *response]])
                logprob = model(ids).logits[0].log_softmax(-1).detach()
                start = len(group.prompt_ids) - 1
                picked = [logprob[start + i, token] for i, token in enumerate(response)]
                assert float(value) == pytest.approx(float(sum(picked)), abs=2e-5)


def bag(path: Path) -> Path:
    file = path / "bag.json"
    file.write_text(json.dumps({"bias": -0.5, "weights": {"good": 2.0, "don't": -1.0}}))
    return file


def test_bag_of_words_counts_a_word_once_over_prompt_and_completion(tmp_path: Path) -> None:
    reward = BagOfWordsReward(bag(tmp_path))
    assert reward.score("Good, GOOD good!") == 1.5
    assert reward.score("I don't know") == -1.5
    chat = [{"role": "user", "content": "good"}]
    assert reward(["It is go", "good", chat], ["od", " no", "no"]) == [1.5, 1.5, -0.5]


def test_the_shipped_reward_likes_what_people_liked() -> None:
    from fastalign.samples import folder

    reward = load_reward(str(folder("pros_cons") / "reward.json"))
    pairs = [
        json.loads(line)
        for line in (folder("pros_cons") / "pairs_eval.jsonl").read_text().splitlines()
    ]
    sides = [
        apply_reward(reward, [row["prompt"] for row in pairs], [row[name] for row in pairs])
        for name in ("response_a", "response_b")
    ]
    judged = [
        (a > b) == (row["label"] == "a")
        for row, a, b in zip(pairs, *sides, strict=True)
        if row["label"] != "tie"
    ]
    assert sum(judged) / len(judged) > 0.9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "expected module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:no_such", "has no function 'no_such'"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_folder_of_another_model_is_no_reward(tmp_path: Path) -> None:
    save_model(tiny_model("llama", vocab_size=320), make_tokenizer(), tmp_path / "sft")
    with pytest.raises(ValueError, match=r"^reward: expected a trained reward model, .*sft"):
        load_reward(str(tmp_path / "sft"))


def test_a_damaged_bag_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bag.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"bag\.json: expected a JSON object with bias"):
        load_reward(str(file))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reward(str(tmp_path / "none.json"))


@pytest.mark.parametrize("returned", [[1.0], [1.0, float("nan")], [1.0, "x"]])
def test_what_a_reward_returns_is_checked(returned: list[float]) -> None:
    with pytest.raises(ValueError, match="reward: expected"):
        apply_reward(lambda prompts, completions: returned, ["a", "b"], ["c", "d"])
