"""PPO's values beside a reward model's scale, and what each form of the KL does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.batch.packed import Group, pack
from fastalign.evaluation.rewards import ModelReward
from fastalign.models.load import load_policy, save_reward_model
from fastalign.models.reward import set_pad_token, set_reward_scale
from fastalign.runs.open import make_compute
from fastalign.runs.state import seed_everything
from fastalign.trainers import (
    KL_PENALTIES,
    KLInReward,
    PPOConfig,
    PPOSettings,
    RewardSourceConfig,
    train_ppo,
)
from fastalign.trainers.ppo.record import token_values
from fastalign.trainers.ppo.setup import PPOSetup, prepare_ppo
from fastalign.trainers.ppo.train import make_experience, measure_experience
from fastalign.trainers.sampling.rollout import Rollouts, roll_out
from tests.small_runs import ppo_config, words_reward
from tests.tiny import tiny_reward_model
from tests.tokenizers import make_tokenizer


def plain(folder: Path, run: str = "run", **train: Any) -> PPOConfig:
    """One mini-batch an epoch, no PTX, a fixed coefficient: what the first update is known of."""
    config = ppo_config(folder, run, **{"max_steps": 2, **train})
    reward = RewardSourceConfig((words_reward(folder),))
    return replace(config, reward=reward, ppo=PPOSettings(epochs=4), kl=KLInReward(coefficient=0.1))


def reward_model(folder: Path) -> str:
    """A reward model whose scores have a scale of their own."""
    model = tiny_reward_model("llama", vocab_size=320)
    set_pad_token(model, 0)
    set_reward_scale(model, torch.tensor([-1.0, 0.0, 4.0]))
    save_reward_model(model, make_tokenizer(), folder / "rm")
    return str(folder / "rm")


def begun(config: PPOConfig) -> tuple[PPOSetup, Rollouts]:
    """A run before its first step, and some rollouts of it."""
    seed_everything(0)
    run = prepare_ppo(config, make_compute(config.train))
    rollouts = roll_out(
        run.sampler, run.prompts, range(6), config.sampling, run.tokenizer, run.sources, seed=3
    )
    return run, rollouts


def test_values_begin_as_the_reward_models_scores(folder: Path) -> None:
    path = reward_model(folder)
    config = replace(plain(folder), reward=RewardSourceConfig((path,)))
    run, _ = begun(config)
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


def drift(folder: Path, run: str) -> float:
    """KL(policy || reference) of a run's end, a token, over the vocabulary."""
    tokenizer = make_tokenizer()
    models = [load_policy(path) for path in (folder / run / "model", folder / "llama")]
    found = []
    for line in (folder / "texts.jsonl").read_text().splitlines():
        tokens = torch.tensor([tokenizer.encode(json.loads(line)["text"])])
        with torch.no_grad():
            ours, theirs = (model(tokens).logits.double().log_softmax(-1) for model in models)
        found.append((ours.exp() * (ours - theirs)).sum(-1).mean().item())
    return sum(found) / len(found)


def test_every_form_of_the_kl_holds_the_policy_near(folder: Path) -> None:
    def train(run: str, coefficient: float, estimator: Any, place: str) -> float:
        kl = KL_PENALTIES[place](coefficient=coefficient, estimator=estimator)
        config = plain(folder, run, max_steps=30)
        train_ppo(replace(config, kl=kl, optim=replace(config.optim, lr=1e-3)))
        return drift(folder, run)

    free = train("free", 0.0, "k1", "reward")
    forms = [("k1", "reward"), ("k2", "loss"), ("k3", "loss"), ("full", "reward"), ("full", "loss")]
    held = {form: train("-".join(form), 1.0, *form) for form in forms}
    assert max(held.values()) < 0.8 * free, (held, free)


def test_the_full_kl_is_the_sum_over_the_vocabulary(folder: Path) -> None:
    config = replace(plain(folder), kl=KLInReward(coefficient=0.1, estimator="full"))
    run, rollouts = begun(config)
    with torch.no_grad():
        for parameter in run.models.policy.parameters():
            parameter.mul_(1.2)
    score = torch.zeros(len(rollouts.rewards))
    update, _ = make_experience(run, rollouts, score, 0.1)
    metrics = measure_experience(run, update)
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
