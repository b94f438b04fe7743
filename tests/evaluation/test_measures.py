"""Hand-worked measures, rewards by name, and log-probs that equal a plain forward's."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.evaluation.measures import mean_margin, preference_accuracy, sampled_kl
from fastalign.evaluation.rewards import BagOfWordsReward, apply_reward, load_reward
from fastalign.evaluation.statistics import estimate, estimate_of_groups
from fastalign.models.forward import sequence_logprobs
from fastalign.models.load import save_model
from fastalign.ranks.errors import UserCodeFailed
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


NUMBERS: list[Any] = [
    *(True, 1, 1.0, Decimal("1"), Fraction(1)),
    *(kind(1) for kind in (np.float16, np.float32, np.float64, np.int8, np.uint64, np.bool_)),
    *(np.array(1.0), np.array(True), torch.tensor(1), torch.tensor(True)),
    *(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0, requires_grad=True)),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__} {n!r}")
def test_every_type_of_number_is_a_reward(number: Any) -> None:
    found = apply_reward(lambda prompts, completions: [number, 0], ["a", "b"], ["c", "d"])
    assert found == [1.0, 0.0]
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    "rewards",
    [
        (1, 0),
        np.array([1, 0]),
        np.array([1, 0], dtype=np.float32),
        np.array([Decimal(1), 0], dtype=object),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0], requires_grad=True),
    ],
    ids=repr,
)
def test_an_array_or_a_tensor_is_as_a_list(rewards: Any) -> None:
    assert apply_reward(lambda prompts, completions: rewards, ["a", "b"], ["c", "d"]) == [1, 0]


NO_NUMBERS: list[Any] = [
    *(None, "0.5", b"0.5", np.str_("0.5"), [1.0], {"score": 1.0}, 1j, np.complex64(1)),
    *(float("nan"), float("inf"), np.float32("nan"), torch.tensor(-torch.inf), 10**400),
    *(np.array([1.0]), torch.tensor([1.0]), np.timedelta64(5, "s"), Decimal("nan"), object),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_anything_else_is_refused_with_its_source_and_row(value: Any) -> None:
    with pytest.raises(ValueError, match="reward: my:own: expected a finite number, got") as error:
        apply_reward(lambda prompts, completions: [1.0, value], ["a", "b"], ["c", "d"], "my:own")
    assert repr(value)[:40] in str(error.value)
    assert str(error.value).endswith("(number 1)")


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"x": 1.0, "y": 2.0}, "dict"),
        ({1.0, 2.0}, "set"),
        ((value for value in (1.0, 2.0)), "generator"),
        ("12", "str"),
        (1.0, "float"),
        (None, "NoneType"),
        (np.array([[1.0], [2.0]]), r"ndarray \(2, 1\)"),
        (torch.ones(2, 1), r"Tensor \(2, 1\)"),
        (torch.tensor(1.0), r"Tensor \(\)"),
        ([1.0], "2 numbers, one for each completion, got 1"),
        ([1.0] * 3, "2 numbers, one for each completion, got 3"),
    ],
)
def test_a_result_that_is_no_list_of_them_is_refused(result: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^reward: expected .*got {said}$|{said}$"):
        apply_reward(lambda prompts, completions: result, ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("error", [ValueError("bug"), OSError("no server"), SystemExit(0)])
def test_an_error_in_a_reward_names_its_source_and_keeps_its_traceback(
    error: BaseException,
) -> None:
    def broken(prompts: list[Any], completions: list[str]) -> list[float]:
        raise error

    said = r"^reward: my:own: the code raised (ValueError\('bug'\)|OSError|sys.exit\(0\))"
    with pytest.raises(UserCodeFailed, match=said) as failed:
        apply_reward(broken, ["a"], ["b"], "my:own")
    assert "in broken" in failed.value.trace
    assert "apply_reward" not in failed.value.trace


def test_an_error_in_the_module_of_a_reward_is_not_taken_for_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserCodeFailed, match="needs_more:f: the code raised ModuleNotFound") as e:
        load_reward("needs_more:f")
    assert "import not_installed_here" in e.value.trace
    with pytest.raises(UserCodeFailed, match=r"reward: leaves:f: the code raised sys.exit\(0\)"):
        load_reward("leaves:f")
    with pytest.raises(ValueError, match=r"cannot import 'is_not_there\.at_all'"):
        load_reward("is_not_there.at_all:f")
