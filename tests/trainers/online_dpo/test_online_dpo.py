"""Online DPO: pairs that are what the rewards say, a reference that is renewed, exact resuming."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.batch.packed import Group
from fastalign.batch.schedule import mini_batches
from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import save_model
from fastalign.rollouts import SamplingParams
from fastalign.runs.config import ModelConfig, RunConfig
from fastalign.trainers import (
    LOSSES,
    FreshPairsConfig,
    OnlineDPOConfig,
    OnlineReferenceConfig,
    PromptDataConfig,
    RewardSourceConfig,
    WatchConfig,
    train_online_dpo,
)
from fastalign.trainers.online_dpo import train as online_dpo
from fastalign.trainers.online_dpo.samples import choose_pairs
from tests.runs.test_resume import assert_same_run
from tests.small_runs import OPTIM, TRAIN, WORDS, read_metrics, saved_tensors, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer
from tests.trainers.test_lora_runs import LN_2, adapter_of, with_lora

HERE = "tests.trainers.online_dpo.test_online_dpo"
NUM_SAMPLES = 4


def vowels(prompts: list[Any], completions: list[str]) -> list[float]:
    """The share of vowels among the characters."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def constant(prompts: list[Any], completions: list[str]) -> list[float]:
    return [0.25] * len(completions)


def online_config(folder: Path, run: str, reward: str = "vowels", **changes: Any) -> Any:
    """Sections by name (`pairs`, `reference`, ...); anything else is of `train`."""
    prompts = str(write_rows(folder / "prompts.jsonl", [{"prompt": f"The {w}"} for w in WORDS]))
    names = ("pairs", "reference", "loss", "watch")
    sections = {name: changes.pop(name) for name in names if name in changes}
    return OnlineDPOConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=PromptDataConfig(train=prompts, eval=changes.pop("eval", None)),
        reward=RewardSourceConfig((f"{HERE}:{reward}",), **changes.pop("score", {})),
        run=RunConfig(dir=str(folder / run), resume=changes.pop("resume", False)),
        sampling=SamplingParams(max_new_tokens=6, num_samples=NUM_SAMPLES),
        optim=changes.pop("optim", OPTIM),
        train=replace(TRAIN, **changes),
        **sections,
    )


RENEWED = {
    "reference": OnlineReferenceConfig(refresh_every=3),
    "pairs": FreshPairsConfig(epochs=2, mini_batches=2),
}


@pytest.mark.parametrize(
    ("changes", "stop"),  # just before the reference is renewed, and after
    [({}, 3), (RENEWED, 3), (RENEWED, 4)],
    ids=["fixed", "before", "after"],
)
def test_a_stopped_and_resumed_run_equals_a_straight_one(
    folder: Path, changes: dict[str, Any], stop: int
) -> None:
    assert train_online_dpo(online_config(folder, "straight", **changes)).finished
    first = train_online_dpo(online_config(folder, "stopped", **changes, stop_at_step=stop))
    assert (first.step, first.finished) == (stop, False)
    train_online_dpo(online_config(folder, "stopped", **changes, resume=True))
    assert_same_run(folder / "straight", folder / "stopped")


def test_two_runs_of_one_seed_are_the_same_and_another_seed_is_another(folder: Path) -> None:
    first, second = online_config(folder, "first"), online_config(folder, "second")
    train_online_dpo(first)
    train_online_dpo(second)
    assert_same_run(folder / "first", folder / "second")
    train_online_dpo(replace(first, run=RunConfig(dir=str(folder / "other"), seed=1)))
    rows = [read_metrics(folder / run) for run in ("first", "other")]
    assert rows[0][0]["reward"] != rows[1][0]["reward"]


def test_samples_are_fresh_in_every_step_and_the_same_in_every_evaluation(folder: Path) -> None:
    still = replace(OPTIM, lr=0.0)
    all_prompts = {"batch_size": len(WORDS), "eval": str(folder / "prompts.jsonl")}
    config = online_config(folder, "run", optim=still, max_steps=3, eval_every=1, **all_prompts)
    train_online_dpo(config)
    rows = read_metrics(folder / "run")
    assert len({row["reward"] for row in rows}) == 3
    assert len({row["eval_reward"] for row in rows}) == 1


def test_a_pair_is_the_best_and_the_worst_of_a_prompt() -> None:
    groups = [
        Group([1], [[10], [11], [12]]),
        Group([2], [[20], [21], [22]]),  # the best twice
        Group([3], [[30], [30], [31]]),  # one score
        Group([4], [[40], [40], [40]]),  # one answer, one score
        Group([5], [[50], [50]]),  # one answer, two scores
    ]
    scores = torch.tensor([0.5, 2.0, -1.0] + [3.0, 3.0, 1.0] + [7.0] * 3 + [1.0] * 3 + [1.0, 2.0])
    found = choose_pairs(groups, scores, "drop")
    assert [pair.response_ids for pair in found.groups] == [[[11], [12]], [[20], [22]]]
    assert [pair.prompt_ids for pair in found.groups] == [[1], [2]]
    assert found.places == [(1, 2), (3, 5)]
    assert (found.ties, found.num_ties_dropped) == ([False, False], 3)
    used = choose_pairs(groups, scores, "use")
    assert used.groups[2] == Group([3], [[30], [31]])
    assert used.places == [(1, 2), (3, 5), (6, 8)]
    assert (used.ties, used.num_ties_dropped) == ([False, False, True], 2)


def test_the_pairs_of_a_run_are_what_the_rewards_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Any] = []
    trained: list[Any] = []

    def note(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            result = function(*arguments)
            seen.append((arguments, result))
            return result

        return noted

    monkeypatch.setattr(online_dpo, "score_samples", note(online_dpo.score_samples, sampled))
    monkeypatch.setattr(online_dpo, "update_on", note(online_dpo.update_on, trained))
    train_online_dpo(online_config(folder, "run", max_steps=2))
    tokenizer = load_tokenizer(folder / "llama")
    for (_, scored), ((_, pairs, *_), _) in zip(sampled, trained, strict=True):
        rollouts = scored.rollouts
        assert len(rollouts.prompts) == TRAIN.batch_size
        assert len(pairs.examples.groups) >= 3
        logprobs = scored.reference_logprob.view(-1, NUM_SAMPLES)
        by_prompt = {tuple(group.prompt_ids): i for i, group in enumerate(rollouts.groups)}
        for pair, reference in zip(pairs.examples.groups, pairs.reference, strict=True):
            place = by_prompt[tuple(pair.prompt_ids)]
            rewards = vowels([], rollouts.texts[place])
            sides = [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair.response_ids]
            assert vowels([], sides) == [max(rewards), min(rewards)]
            assert max(rewards) > min(rewards)
            samples = rollouts.groups[place].response_ids
            for ids, value in zip(pair.response_ids, reference, strict=True):
                assert value == logprobs[place][samples.index(ids)]


@pytest.mark.parametrize("every", [0, 3])
def test_the_reference_is_the_policy_where_it_is_renewed(folder: Path, every: int) -> None:
    reference = OnlineReferenceConfig(refresh_every=every)
    train_online_dpo(online_config(folder, "run", reference=reference))
    rows = read_metrics(folder / "run")
    same = [1, 4, 7] if every else [1]
    for row in rows:
        at_start = row["step"] in same
        assert (abs(row["loss"] - LN_2) < 1e-6) == at_start, row["step"]
        assert (abs(row["objective/kl"]) < 1e-5) == at_start, row["step"]
        assert row["objective/non_score_reward"] == -0.1 * row["objective/kl"]
        assert row["objective/scores_margin"] > 0
    held = saved_tensors(folder / "run/checkpoints/step-000008", "reference.")
    assert bool(held) == bool(every)


def test_the_reference_is_what_the_policy_was(folder: Path) -> None:
    """By hand: after the run, the reference's weights are the policy's of step 6."""
    config = online_config(
        folder, "run", reference=OnlineReferenceConfig(refresh_every=3), save_every=6
    )
    train_online_dpo(config)
    checkpoints = folder / "run/checkpoints"
    reference = saved_tensors(checkpoints / "step-000008", "reference.")
    policy = saved_tensors(checkpoints / "step-000006", "model.")
    last = saved_tensors(checkpoints / "step-000008", "model.")
    assert reference.keys() == policy.keys()
    assert all(torch.equal(reference[name], policy[name]) for name in policy)
    assert not all(torch.equal(reference[name], last[name]) for name in policy)


def test_another_model_may_be_the_reference(folder: Path) -> None:
    save_model(tiny_model("llama", vocab_size=320, seed=1), make_tokenizer(), folder / "other")
    other = OnlineReferenceConfig(path=str(folder / "other"))
    train_online_dpo(online_config(folder, "run", reference=other, max_steps=1))
    assert read_metrics(folder / "run")[0]["objective/kl"] > 0.1


@pytest.mark.parametrize("every", [0, 2])
def test_with_an_adapter_the_reference_is_its_base_or_an_earlier_adapter(
    folder: Path, every: int
) -> None:
    def config(run: str, **train: Any) -> Any:
        reference = OnlineReferenceConfig(refresh_every=every)
        return with_lora(online_config(folder, run, reference=reference, **train))

    train_online_dpo(config("straight"))
    at_start = [abs(r["loss"] - LN_2) < 1e-6 for r in read_metrics(folder / "straight")]
    assert at_start == [number == 0 or (every == 2 and number % 2 == 0) for number in range(8)]
    train_online_dpo(config("stopped", stop_at_step=3))
    train_online_dpo(config("stopped", resume=True))
    assert_same_run(folder / "straight", folder / "stopped")
    assert adapter_of(folder / "straight")


@pytest.mark.parametrize("other", [False, True])
def test_a_resumed_run_finds_its_reference_again_or_says_that_it_is_another(
    folder: Path, other: bool
) -> None:
    name = "other" if other else "llama"
    save_model(tiny_model("llama", vocab_size=320, seed=1), make_tokenizer(), folder / "other")
    changes = {"reference": OnlineReferenceConfig(str(folder / "other"))} if other else {}
    train_online_dpo(online_config(folder, "run", **changes, stop_at_step=2))
    save_model(tiny_model("llama", vocab_size=320, seed=7), make_tokenizer(), folder / name)
    with pytest.raises(ValueError, match=r"the frozen reference is not what .* was trained on"):
        train_online_dpo(online_config(folder, "run", **changes, resume=True))


def test_prompts_leave_room_in_the_reference_too(folder: Path) -> None:
    short = tiny_model("llama", vocab_size=320)
    short.config.max_position_embeddings = 8
    save_model(short, make_tokenizer(), folder / "short")
    reference = OnlineReferenceConfig(path=str(folder / "short"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: expected at most 2 tokens"):
        train_online_dpo(online_config(folder, "run", reference=reference))


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_collapsed_run_says_so_and_is_ended(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = WatchConfig(stop=True, patience=2, max_unfinished=0.0)
    config = online_config(folder, "run", watch=watch, loss=LOSSES[name]())
    result = train_online_dpo(config)
    assert (result.step, result.finished, result.exit_code) == (2, False, 3)
    out = capsys.readouterr().out
    assert out.count("the policy looks collapsed: share without an end 1 above 0") == 1
    assert "stopped at step 2 (collapsed for 2 steps: share without an end 1 above 0)" in out
    assert [row["collapsed"] for row in read_metrics(folder / "run")] == [1, 2]


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / run / "model/model.safetensors"))


def test_a_constant_reward_says_so_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_online_dpo(online_config(folder, "run", reward="constant"))
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if "no pair of" in line]
    assert "8 of 8 steps had no learning signal" in out
    assert said == [
        "step 1: no pair of 4 prompts (the samples of each have one score, or are the same); no "
        "weight is changed by such a step"
    ]
    rows = read_metrics(folder / "run")
    assert [(row["num_pairs"], row["num_ties_dropped"]) for row in rows] == [(0, 4)] * 8
    assert [row["num_steps_without_signal"] for row in rows] == list(range(1, 9))
    before, after = load_file(folder / "llama/model.safetensors"), weights(folder, "run")
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_loss_with_ties_uses_them(folder: Path) -> None:
    use = {"pairs": FreshPairsConfig(ties="use"), "loss": LOSSES["dpo_rao_kupper"]()}
    train_online_dpo(online_config(folder, "run", reward="constant", **use))
    rows = read_metrics(folder / "run")
    for row in rows:
        assert (row["num_pairs"], row["num_ties"], row["num_ties_dropped"]) == (4, 4, 0)
        assert row["objective/scores_margin"] == 0
    # nu = 3: equal answers tie with one half, and nothing pulls them away from there
    assert rows[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert rows[0]["grad_norm"] < 1e-4


def test_a_missing_end_makes_a_sample_the_worse_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = online_dpo.choose_pairs

    def noted(*arguments: Any) -> Any:
        seen.append(plain(*arguments))
        return seen[-1]

    monkeypatch.setattr(online_dpo, "choose_pairs", noted)
    config = online_config(folder, "run", reward="constant", score={"missing_eos_penalty": 1.0})
    longer = replace(config.sampling, max_new_tokens=30)
    train = replace(config.train, batch_size=26, max_steps=2)
    train_online_dpo(replace(config, sampling=longer, train=train))
    pairs = [group for found in seen for group in found.groups]
    assert len(pairs) >= 3
    for pair in pairs:
        ended, cut = pair.response_ids
        assert (ended[-1], len(cut), cut[-1] == 2) == (2, 30, False)


def test_the_reward_rises(folder: Path) -> None:
    optim = replace(OPTIM, lr=3e-3, schedule="constant", weight_decay=0.0)
    evaluated = str(folder / "prompts.jsonl")
    config = online_config(
        folder, "run", optim=optim, max_steps=25, batch_size=13, eval=evaluated, eval_every=24
    )
    train_online_dpo(config)
    rows = read_metrics(folder / "run")
    rewards = [row["objective/scores"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards
    assert rows[-1]["eval_objective/scores"] > sum(rewards[:3]) / 3 + 0.1
    assert rows[-1]["eval_objective/kl"] > 0.5
    assert rows[-1]["eval_reward"] == pytest.approx(
        rows[-1]["eval_rewards/" + f"{HERE}:vowels/mean"]
    )


def test_updates_of_a_step_share_its_pairs(folder: Path) -> None:
    config = online_config(folder, "run", pairs=FreshPairsConfig(epochs=3, mini_batches=2))
    for num_pairs in (1, 2, 5):
        part = mini_batches(num_pairs, 2, "4")
        assert len(part) == min(2, num_pairs)
        assert sorted(i for batch in part for i in batch) == list(range(num_pairs))
        assert max(map(len, part)) - min(map(len, part)) <= 1
    train_online_dpo(config)
    assert {row["num_updates"] for row in read_metrics(folder / "run")} == {6}


def test_an_update_that_is_not_finite_ends_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = online_dpo.dpo_gradient
    losses = iter([0, 0, 0, 1])

    def poisoned(*arguments: Any) -> Any:
        total = plain(*arguments)
        total.loss = float("nan") if next(losses, 0) else total.loss
        return total

    monkeypatch.setattr(online_dpo, "dpo_gradient", poisoned)
    pairs = FreshPairsConfig(epochs=2)
    train_online_dpo(online_config(folder, "run", pairs=pairs, max_steps=3))
    rows = read_metrics(folder / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert all(bool(value.isfinite().all()) for value in weights(folder, "run").values())


@pytest.mark.parametrize("name", ["simpo", "ipo_sum", "dpo_length_normalised"])
def test_other_losses_train(folder: Path, name: str) -> None:
    train_online_dpo(online_config(folder, "run", loss=LOSSES[name](), max_steps=2))
    for row in read_metrics(folder / "run"):
        assert row["grad_norm"] > 0
        assert ("objective/kl" in row) == (name != "simpo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": SamplingParams(num_samples=1)},
            r"sampling\.num_samples: expected at least 2",
        ),
        (
            {"sampling": SamplingParams(num_samples=2, temperature=0.0)},
            r"sampling\.temperature: expected more than 0",
        ),
        ({"pairs": FreshPairsConfig(ties="use")}, r"pairs\.ties: expected drop, for this loss"),
        (
            {"loss": LOSSES["orpo"](), "reference": OnlineReferenceConfig(path="there")},
            r"reference\.path: expected none, for this loss has no reference, got 'there'",
        ),
        (
            {"loss": LOSSES["simpo"](), "reference": OnlineReferenceConfig(refresh_every=2)},
            r"reference\.refresh_every: expected 0, for this loss has no reference, got 2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(online_config(folder, "run"), **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreshPairsConfig(epochs=0), r"pairs\.epochs: expected at least 1, got 0"),
        (lambda: FreshPairsConfig(mini_batches=0), r"pairs\.mini_batches: .* got 0"),
        (lambda: OnlineReferenceConfig(refresh_every=-1), r"refresh_every: .*, got -1"),
        (lambda: OnlineReferenceConfig("there", 2), r"expected no reference\.path with it"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
