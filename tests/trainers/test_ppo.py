"""PPO: the shape of a first update, what its numbers are of, and the settings that change them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.batch import Group, pack
from fastalign.cli.main import main
from fastalign.evaluation import ModelReward
from fastalign.models import save_reward_model, set_pad_token, set_reward_scale
from fastalign.rollouts import SamplingParams
from fastalign.trainers import (
    KLConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOSettings,
    RewardSourceConfig,
    ValueConfig,
    WatchConfig,
    train_ppo,
)
from fastalign.trainers.optimizer import make_optimizer
from fastalign.trainers.ppo import prepare_update
from fastalign.trainers.ppo_losses import Update
from fastalign.trainers.ppo_models import token_values
from fastalign.trainers.ppo_run import PPORun, prepare
from fastalign.trainers.ppo_update import all_updates, mean_of_updates
from fastalign.trainers.reward_sources import final_scores
from fastalign.trainers.rollout import Rollouts, roll_out
from fastalign.trainers.setup import seed_everything
from fastalign.trainers.state import TrainState
from fastalign.trainers.step import make_compute
from tests.runs import ppo_config, read_metrics, words_reward
from tests.tiny import tiny_reward_model
from tests.tokenizers import make_tokenizer


def plain(folder: Path, run: str = "run", **train: Any) -> PPOConfig:
    """One mini-batch an epoch, no PTX, a fixed coefficient: what the first update is known of."""
    config = ppo_config(folder, run, **{"max_steps": 2, **train})
    reward = RewardSourceConfig((words_reward(folder),))
    return replace(config, reward=reward, ppo=PPOSettings(epochs=4), kl=KLConfig(coefficient=0.1))


def reward_model(folder: Path) -> str:
    """A reward model whose scores have a scale of their own."""
    model = tiny_reward_model("llama", vocab_size=320)
    set_pad_token(model, 0)
    set_reward_scale(model, torch.tensor([-1.0, 0.0, 4.0]))
    save_reward_model(model, make_tokenizer(), folder / "rm")
    return str(folder / "rm")


def begun(config: PPOConfig) -> tuple[PPORun, Rollouts, Update, dict[str, Any]]:
    """The first step's rollouts and what its updates are made of."""
    seed_everything(0)
    run = prepare(config, make_compute(config.train))
    rollouts = roll_out(
        run.sampler, run.prompts, range(6), config.sampling, run.tokenizer, run.sources, seed=3
    )
    score = final_scores(config.reward, rollouts.rewards, rollouts.ended, None)
    update, metrics = prepare_update(run, rollouts, score, config.kl.coefficient)
    return run, rollouts, update, metrics


def updated(run: PPORun, update: Update, num_steps: int = 1) -> list[dict[str, Any]]:
    trained = run.models.trained
    return all_updates(
        update, TrainState(trained, make_optimizer(trained, update.config.optim)), num_steps
    )


def test_the_first_update_has_the_published_shape(folder: Path) -> None:
    config = plain(folder)
    run, _, update, _ = begun(replace(config, optim=replace(config.optim, warmup_steps=0)))
    epochs = updated(run, update)
    assert epochs[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert epochs[0]["policy/clipfrac_avg"] == 0
    assert epochs[0]["policy/approxkl_avg"] < 1e-9
    moved = [epoch["policy/approxkl_avg"] for epoch in epochs]
    assert moved == sorted(moved)
    assert moved[-1] > 1e-4
    assert epochs[-1]["val/ratio"] != 1.0
    assert mean_of_updates(epochs)["val/ratio_var"] > 0


@pytest.mark.parametrize("tokens", [30, 100000])
@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded"])
def test_the_ratio_is_one_whatever_the_micro_batches(
    folder: Path, tokens: int, packing: str
) -> None:
    run, _, update, metrics = begun(plain(folder, tokens_per_batch=tokens, packing=packing))
    first, *_ = updated(run, update)
    assert (metrics["num_micro_batches"] > 2) == (tokens == 30)
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/clipfrac_avg"] == 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_values_begin_as_the_reward_models_scores(folder: Path) -> None:
    path = reward_model(folder)
    config = replace(plain(folder), reward=RewardSourceConfig((path,)))
    run, _, _, _ = begun(config)
    texts = [" best", " small slow", " menu good life"]
    # A place more behind the end, which predicts the last token here: the value of a whole answer.
    answers = [[*run.tokenizer.encode(t, add_special_tokens=False), 2, 5] for t in texts]
    groups = [Group(run.prompts.prompt_ids[0], answers)]
    values = token_values(run.models.value, pack(groups), run.compute, None)
    last = pack(groups).target_bounds[1:] - 1
    scores = run.sources.score([run.prompts.prompts[0]] * 3, texts)[0]
    torch.testing.assert_close(values[last].double(), scores, rtol=1e-4, atol=1e-5)
    raw = ModelReward(path, raw=True)([run.prompts.prompts[0]] * 3, texts)
    assert scores.tolist() == pytest.approx(
        [(score - 1.0) / (14 / 3) ** 0.5 for score in raw], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(
    ("kl", "place"),
    [("k1", "reward"), ("k2", "loss"), ("k3", "loss"), ("full", "reward"), ("full", "loss")],
)
def test_the_kl_holds_the_policy_near(folder: Path, kl: str, place: str) -> None:
    final = []
    for coefficient in (0.0, 1.0):
        config = plain(folder, f"run-{coefficient}", max_steps=30)
        of_kl = KLConfig(coefficient=coefficient, estimator=kl, place=place)  # type: ignore[arg-type]
        train_ppo(replace(config, kl=of_kl, optim=replace(config.optim, lr=1e-2)))
        last = read_metrics(folder / f"run-{coefficient}")[-5:]
        final.append(sum(row["objective/kl"] for row in last))
    assert final[1] < 0.8 * final[0]


def test_the_full_kl_is_the_sum_over_the_vocabulary(folder: Path) -> None:
    config = replace(plain(folder), kl=KLConfig(coefficient=0.1, estimator="full"))
    run, rollouts, _, _ = begun(config)
    with torch.no_grad():
        for parameter in run.models.policy.parameters():
            parameter.mul_(1.2)
    score = torch.zeros(len(rollouts.rewards))
    update, metrics = prepare_update(run, rollouts, score, 0.1)
    found, place = [], 0
    for group in rollouts.groups:
        for ids in group.response_ids:
            tokens = torch.tensor([[*group.prompt_ids, *ids]])
            rows = slice(len(group.prompt_ids) - 1, tokens.shape[1] - 1)
            with torch.no_grad():
                ours, theirs = (
                    m(tokens).logits[0, rows].double().log_softmax(-1)
                    for m in (run.models.policy, run.models.reference)
                )
            found.append((ours.exp() * (ours - theirs)).sum(-1))
            place += len(ids)
    expected = torch.cat(found)
    assert update.record.full_kl is not None
    torch.testing.assert_close(update.record.full_kl.double(), expected, rtol=1e-4, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(expected.sum().item() / len(found), rel=1e-4)


def greedy_for_words(folder: Path, settings: PPOSettings, lr: float) -> PPOConfig:
    """Forty steps with nothing but the score to follow."""
    config = plain(folder, max_steps=40, batch_size=8)
    return replace(
        config,
        ppo=settings,
        kl=KLConfig(coefficient=0.0),
        sampling=SamplingParams(max_new_tokens=5, num_samples=4),
        optim=replace(config.optim, lr=lr, weight_decay=0.0),
    )


def assert_the_score_rose(rows: list[dict[str, Any]]) -> None:
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_loop_without_critic_raises_the_reward(folder: Path, advantage: str) -> None:
    settings = PPOSettings(advantage=advantage, epochs=3)  # type: ignore[arg-type]
    config = greedy_for_words(folder, settings, lr=3e-3)
    train_ppo(config)
    assert_the_score_rose(read_metrics(folder / "run"))
    assert not (folder / "run" / "value").exists()
    with pytest.raises(ValueError, match=r"num_samples: expected at least 2 under .*, got 1"):
        replace(config, sampling=SamplingParams(num_samples=1))


def test_gae_raises_the_reward_and_the_critic_learns(folder: Path) -> None:
    config = greedy_for_words(folder, PPOSettings(epochs=3, whiten="both"), lr=1e-2)
    train_ppo(replace(config, value=ValueConfig(lr=3e-3, coefficient=1.0, clip_range=5.0)))
    rows = read_metrics(folder / "run")
    assert_the_score_rose(rows)
    explained = [row["critic/explained_var"] for row in rows]
    assert sum(explained[-5:]) > sum(explained[:5])


def test_under_an_adapter_the_reference_is_its_base(folder: Path) -> None:
    config = plain(folder)
    lora = ModelConfig(config.model.path, lora=LoraConfig(rank=2))
    run, _, update, metrics = begun(replace(config, model=lora))
    assert run.models.reference is run.models.policy
    assert run.models.frozen is None
    assert abs(metrics["objective/kl"]) < 1e-5
    updated(run, update)
    with torch.no_grad():
        _, after = prepare_update(run, begun_again(run), torch.zeros(12), 0.1)
    assert abs(after["objective/kl"]) > 1e-5


def begun_again(run: PPORun) -> Rollouts:
    return roll_out(
        run.sampler, run.prompts, range(6), run.config.sampling, run.tokenizer, run.sources, seed=3
    )


def test_a_collapse_is_said_and_ends_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = plain(folder, max_steps=6)
    watched = replace(config, watch=WatchConfig(stop=True, patience=2, min_entropy=50.0))
    result = train_ppo(watched)
    assert (result.step, result.finished, result.exit_code) == (2, False, 3)
    out = capsys.readouterr().out
    assert out.count("the policy looks collapsed: entropy ") == 1
    assert "stopped at step 2 (collapsed for 2 steps: entropy " in out
    assert [row["collapsed"] for row in read_metrics(folder / "run")] == [1, 2]
    again = replace(watched, watch=WatchConfig(), run=replace(watched.run, dir=str(folder / "on")))
    assert train_ppo(again).finished


def test_a_reward_that_is_not_finite_ends_in_one_line(folder: Path) -> None:
    source = RewardSourceConfig(("tests.trainers.test_rollouts:nonsense",))
    config = replace(plain(folder), reward=source)
    with pytest.raises(ValueError, match=r"nonsense: reward: expected a finite number, got nan"):
        train_ppo(config)


BAD = {
    "no reward": ((), "reward.sources: expected at least one"),
    "a causal model": (("--reward.sources", "{folder}/llama"), "expected a trained reward model"),
    "weights": (
        ("--reward.sources", "{folder}/words.json", "--reward.weights", "1", "2"),
        "reward.weights: expected 1, one for each of reward.sources, got 2",
    ),
    "too many tokens": (
        ("--reward.sources", "{folder}/words.json", "--sampling.max-new-tokens", "64"),
        "sampling.max_new_tokens: expected less than the model's 64 positions, got 64",
    ),
    "a sharpened sampler": (
        ("--reward.sources", "{folder}/words.json", "--sampling.top-p", "0.9"),
        "sampling: expected samples of the policy itself",
    ),
    "k1 in the loss": (
        ("--reward.sources", "{folder}/words.json", "--kl.place", "loss"),
        "kl.estimator: expected k2, k3 or full for a KL in the loss, got k1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = BAD[name]
    words_reward(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The menu"}) + "\n")
    code = main(
        [
            *("ppo", "--model.path", str(folder / "llama"), "--data.train", str(prompts)),
            *("--run.dir", str(folder / "run"), "--train.device", "cpu"),
            *(word.format(folder=folder) for word in words),
        ]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert expected in " ".join(error.split())
    assert "Traceback" not in error
