"""PPO's step: its gradient beside plain torch, its first update, its advantages, its metrics."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.batch.schedule import mini_batches
from fastalign.rollouts import Completion
from fastalign.runs.accumulate import measure_examples
from fastalign.trainers import Gae, KLInLoss, KLInReward, Rloo, Truncated
from fastalign.trainers.ppo import record as ppo_record
from fastalign.trainers.ppo import train as ppo
from fastalign.trainers.ppo.advantages import ADVANTAGES, AdvantageEstimator
from fastalign.trainers.ppo.config import KLPenalty
from fastalign.trainers.ppo.record import mean_of_updates
from fastalign.trainers.ppo.setup import demonstrations_of
from fastalign.trainers.ppo.train import all_updates, one_update, update_gradient
from fastalign.trainers.sampling.rollout import final_scores
from tests.small_runs import WORDS, write_rows
from tests.trainers.dpo.step_cases import PACKINGS, gradients
from tests.trainers.ppo.ppo_cases import (
    FixedSampler,
    eager_loss,
    experience_of,
    make_run,
    plain_config,
    rollouts_of,
    state_of,
)

FORMS: dict[str, dict[str, Any]] = {
    "k1": {"kl": {"coefficient": 0.3}},
    "k3": {
        "kl": {"coefficient": 0.3, "estimator": "k3"},
        "ppo": {"advantage": Gae(gae_lambda=0.8, gamma=0.9)},
    },
    "full": {"kl": {"coefficient": 0.3, "estimator": "full"}},
    "full-unwhitened": {
        "kl": {"coefficient": 0.3, "estimator": "full"},
        "ppo": {"advantage": Gae(whiten="none")},
    },
    "k2-loss": {"kl": KLInLoss(coefficient=0.3, estimator="k2")},
    "full-loss": {
        "kl": KLInLoss(coefficient=0.3, estimator="full"),
        "ppo": {"entropy_coefficient": 0.2},
    },
    "entropy": {"ppo": {"entropy_coefficient": 0.2, "advantage": Gae(whiten="none")}},
    "temperature": {"sampling": {"temperature": 0.6}, "kl": {"coefficient": 0.3}},
}


def first_gradient(run: Any, rollouts: Any) -> tuple[float, dict[str, torch.Tensor]]:
    experience, _ = experience_of(run, rollouts)
    terms = update_gradient(run, experience, range(len(rollouts.groups)), 0)
    return sum(total.loss for _, total in terms.values()), gradients(run.models.trained)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_updates_gradient_is_that_of_plain_torch(folder: Path, form: str) -> None:
    run = make_run(plain_config(folder, **FORMS[form]))
    rollouts = rollouts_of(run)
    loss, found = first_gradient(run, rollouts)
    expected = eager_loss(run, rollouts, rollouts.rewards.tolist())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    eager = gradients(run.models.trained)
    assert found.keys() == eager.keys()
    assert any(name.startswith("value.") for name in found)
    for name, value in eager.items():
        size = value.abs().max().item()
        assert size > 0
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("form", ["k1", "full-loss"])
def test_a_step_does_not_depend_on_packing_or_micro_batches(
    folder: Path, packing: str, tokens: int, form: str
) -> None:
    config = plain_config(folder, **FORMS[form])
    whole = make_run(config)
    rollouts = rollouts_of(whole)
    loss, gradient = first_gradient(whole, rollouts)
    run = make_run(config, packing=packing, tokens_per_batch=tokens)
    parts_loss, parts = first_gradient(run, rollouts)
    assert parts_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
    for name, value in gradient.items():
        size = value.abs().max().item()
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4 * size)


def test_the_ratio_is_one_however_the_tokens_are_batched_later(folder: Path) -> None:
    run = make_run(plain_config(folder))
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    for packing in PACKINGS:
        other = make_run(plain_config(folder), packing=packing, tokens_per_batch=60)
        examples = measure_examples(rollouts.groups, other.compute.packing)
        again = replace(experience, examples=examples)
        metrics = one_update(
            replace(other, config=run.config), again, state_of(other), [3, 0, 4, 2, 1], 0, 8
        )
        assert metrics["num_micro_batches"] > 2
        assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["policy/clipfrac_avg"] == 0
        assert metrics["policy/approxkl_avg"] < 1e-9


def test_the_first_update_has_ratio_one_and_later_ones_move_away(folder: Path) -> None:
    """The shape of openai's first step: approxkl and clipfrac 0, then growing over the epochs."""
    run = make_run(plain_config(folder, ppo={"epochs": 4}))
    experience, _ = experience_of(run, rollouts_of(run))
    updates = all_updates(run, experience, state_of(run), 8)
    assert len(updates) == 4
    assert updates[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert updates[0]["policy/clipfrac_avg"] == 0
    assert updates[0]["val/clipfrac_avg"] == 0
    distances = [metrics["policy/approxkl_avg"] for metrics in updates]
    assert distances[0] < 1e-9
    assert 1e-5 < distances[1] < distances[2] < distances[3]
    assert updates[3]["policy/clipfrac_avg"] > 0
    losses = [metrics["loss/value_avg"] for metrics in updates]
    assert losses == sorted(losses, reverse=True)
    means = mean_of_updates(updates)
    assert means["policy/approxkl_avg"] == pytest.approx(sum(distances) / 4)
    assert means["num_micro_batches"] == 8
    ratios = [metrics["val/ratio"] for metrics in updates]
    spread = sum((ratio - sum(ratios) / 4) ** 2 for ratio in ratios) / 4
    assert means["val/ratio_var"] == pytest.approx(spread)


@pytest.mark.parametrize(
    ("kl", "advantage", "waits"),
    [
        (KLInLoss(0.3, "k2"), Gae(), (True, True)),
        (KLInReward(0.3, "k1"), Rloo(), (True, False)),
        (KLInReward(0.3, "k1"), Gae(gamma=0.9), (False, True)),
    ],
    ids=["loss", "rloo", "gae"],
)
@pytest.mark.parametrize("buffer", [None, 2**14])
def test_the_first_update_computes_the_numbers_that_nothing_needs_before(
    folder: Path,
    kl: KLPenalty,
    advantage: AdvantageEstimator,
    waits: tuple[bool, bool],
    buffer: int | None,
) -> None:
    """In several micro-batches, each in one chunk of the head or in several."""
    settings = {"epochs": 2, "advantage": advantage}
    config = plain_config(folder, kl=kl, ppo=settings, sampling={"num_samples": 3})
    assert ppo_record.first_update_can_compute(config) == waits
    found = []
    for wait in (ppo_record.NOTHING_WAITS, ppo_record.Wait(*waits)):
        run = make_run(config, tokens_per_batch=120, max_buffer_bytes=buffer)
        rollouts = rollouts_of(run)
        score = final_scores(config.reward, rollouts.rewards, rollouts.ended, None)
        experience, _ = ppo.make_experience(run, rollouts, score, 0.3, wait)
        assert bool(experience.record.logprob.isnan().all()) == wait.logprob
        value = experience.record.value
        assert wait.value == (value is not None and bool(value.isnan().all()))
        updates = all_updates(run, experience, state_of(run), 8)
        measured = ppo.measure_experience(run, experience)
        weights = torch.cat([weight.flatten() for weight in run.models.policy.parameters()])
        assert bool(experience.advantages.advantage.isfinite().all())
        found.append((experience, updates, measured, weights.detach()))
    (early, updates, measured, weights), (late, late_updates, late_measured, late_weights) = found
    torch.testing.assert_close(late.advantages.advantage, early.advantages.advantage)
    torch.testing.assert_close(late.advantages.returns, early.advantages.returns)
    record, late = early.record, late.record
    torch.testing.assert_close(late.logprob, record.logprob)
    torch.testing.assert_close(late.entropy, record.entropy)
    torch.testing.assert_close(late.value, record.value)
    assert late_updates[0]["policy/approxkl_avg"] <= (0 if waits[0] else 1e-9)
    assert late_updates[1]["policy/approxkl_avg"] > 1e-6
    for after, before in zip(late_updates, updates, strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-6)
    assert late_measured == pytest.approx(measured, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(late_weights, weights, rtol=1e-4, atol=1e-6)


def test_numbers_come_first_where_a_reward_or_a_part_of_the_tokens_needs_them(
    folder: Path,
) -> None:
    loss = KLInLoss(coefficient=0.3)
    rloo = {"ppo": {"advantage": Rloo()}, "sampling": {"num_samples": 2}}
    expected: list[tuple[dict[str, Any], bool, bool]] = [
        ({"kl": loss}, True, True),
        ({"kl": {"coefficient": 0.0}}, True, True),
        ({"kl": loss, "ppo": {"epochs": 3}}, True, True),
        ({"kl": {"coefficient": 0.1}, **rloo}, True, False),
        ({"kl": {"coefficient": 0.1}}, False, True),
        ({**rloo, "ppo": {"advantage": Rloo(whiten="advantages")}}, False, False),
        ({"kl": KLInLoss(coefficient=0.3, estimator="full")}, False, False),
        ({"kl": loss, "ppo": {"mini_batches": 2}}, False, False),
        ({"kl": loss, "ppo": {"importance": Truncated()}}, False, True),
        ({"ppo": {"advantage": Gae(whiten="rewards")}}, False, False),
    ]
    for sections, logprob, value in expected:
        config = plain_config(folder, **sections)
        assert ppo_record.first_update_can_compute(config) == (logprob, value)


def test_mini_batches_are_each_prompt_once_an_epoch_in_another_order() -> None:
    parts = [mini_batches(10, 3, f"0/{e}") for e in range(2)]
    assert [len(part) for part in parts[0]] == [3, 3, 4]
    for part in parts:
        assert sorted(group for groups in part for group in groups) == list(range(10))
    assert parts[0] != parts[1]
    assert parts[0] == mini_batches(10, 3, "0/0")


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_without_a_critic_a_response_has_one_advantage(folder: Path, method: str) -> None:
    config = plain_config(
        folder,
        ppo={"advantage": ADVANTAGES[method]()},
        sampling={"num_samples": 3},
        kl={"coefficient": 0.3},
    )
    run = make_run(config)
    assert run.models.value is None
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    record, bounds = experience.record, experience.record.bounds.tolist()
    x = (record.logprob - record.reference_logprob).tolist()
    total = [
        reward - 0.3 * sum(x[first:last])
        for reward, first, last in zip(rollouts.rewards.tolist(), bounds, bounds[1:], strict=False)
    ]
    for start in range(0, len(total), 3):
        group = total[start : start + 3]
        mean = sum(group) / 3
        std = math.sqrt(sum((value - mean) ** 2 for value in group) / 2)
        for place, value in enumerate(group):
            others = (sum(group) - value) / 2
            expected = value - others if method == "rloo" else (value - mean) / (std + 1e-4)
            first, last = bounds[start + place], bounds[start + place + 1]
            found = experience.advantages.advantage[first:last].tolist()
            assert found == pytest.approx([expected] * (last - first), rel=1e-3, abs=1e-3)
    advantage = ADVANTAGES[method](whiten="advantages")
    whitened = replace(config, ppo=replace(config.ppo, advantage=advantage))
    experience, _ = experience_of(make_run(whitened), rollouts)
    assert experience.advantages.advantage.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_rewards_are_whitened_without_a_shift_of_their_mean(folder: Path) -> None:
    config = plain_config(folder, ppo={"advantage": Gae(whiten="rewards", gae_lambda=1.0)})
    run = make_run(config)
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    score = rollouts.rewards.float()
    reward = ppo.penalise(experience.record, score, config.kl, config.kl.coefficient).reward
    white = (reward - reward.mean()) / reward.std(correction=0) + reward.mean()
    first = experience.record.bounds.tolist()[1]
    # With gamma and lambda 1 the first token's return is the sum of the response's rewards.
    assert experience.advantages.returns is not None
    assert experience.advantages.returns[0].item() == pytest.approx(
        white[:first].sum().item(), rel=1e-3
    )


def test_the_metrics_of_a_step(folder: Path) -> None:
    run = make_run(plain_config(folder, reward={"missing_eos_penalty": 2.0}))
    rollouts = rollouts_of(run)
    experience, metrics = experience_of(run, rollouts)
    record = experience.record
    kl = (record.logprob - record.reference_logprob).sum().item() / 10
    assert kl != 0
    assert metrics["objective/kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.05 * kl, rel=1e-4)
    unfinished = 1 - rollouts.ended.double().mean().item()
    assert unfinished > 0
    score = rollouts.rewards.mean().item() - 2.0 * unfinished
    assert metrics["objective/scores"] == pytest.approx(score, rel=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(score - 0.05 * kl, rel=1e-4)
    assert metrics["objective/entropy"] == pytest.approx(-record.logprob.sum().item() / 10)
    assert metrics["entropy"] == pytest.approx(record.entropy.mean().item())
    assert experience.advantages.returns is not None
    assert record.value is not None
    left = (experience.advantages.returns - record.value).var(
        correction=0
    ) / experience.advantages.returns.var(correction=0)
    assert metrics["critic/explained_var"] == pytest.approx(1 - left.item(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_trainers_logprobs_are_the_samplers(folder: Path, temperature: float) -> None:
    run = make_run(plain_config(folder, sampling={"temperature": temperature}))
    _, metrics = experience_of(run, rollouts_of(run))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_a_sampler_that_drifts_is_seen_and_its_tokens_are_weighted(folder: Path) -> None:
    run = make_run(plain_config(folder, ppo={"importance": Truncated(max_weight=1.5)}))
    exact = rollouts_of(run)
    shifts = [0.0, 1.0, -1.0]  # the trainer's less the sampler's
    answers = [
        [
            Completion(
                a.token_ids,
                [p - shifts[i % 3] for i, p in enumerate(a.logprobs)],
                a.finish_reason,
            )
            for a in each
        ]
        for each in exact.completions
    ]
    drifted = replace(exact, completions=answers)
    experience, metrics = experience_of(run, drifted)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(math.e, rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1 / math.e, rel=1e-4)
    expected = [1.0, 1.5, math.exp(-1.0)]
    assert experience.weight is not None
    assert experience.weight[:3].tolist() == pytest.approx(expected, rel=1e-4)
    _, weighted = first_gradient(run, drifted)
    _, plain = first_gradient(make_run(plain_config(folder)), exact)
    name = "policy.lm_head.weight"
    assert (weighted[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max()


def test_completions_of_an_end_alone_can_be_trained_on(folder: Path) -> None:
    run = make_run(plain_config(folder))
    empty = FixedSampler([Completion([2], [-1.0], "stop"), Completion([7], [-1.0], "length")])
    state = state_of(run)
    state.step = 1  # the policy has moved
    metrics = ppo.ppo_step(replace(run, sampler=empty), state, [0, 1, 2, 3], 8)
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)
    assert metrics["skipped"] == 0
    assert metrics["completions/mean_length"] == 1
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["collapsed"] == 1


def test_one_update_that_is_not_finite_is_skipped_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(plain_config(folder, ppo={"epochs": 3}))
    plain = ppo.value_batch_loss
    calls: list[int] = []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        loss, metrics = plain(*arguments)
        return loss * (math.nan if len(calls) == 2 else 1), metrics

    monkeypatch.setattr(ppo, "value_batch_loss", broken)
    state = state_of(run)
    state.step = 1  # the policy has moved
    seen: list[tuple[int, bool]] = []
    step = ppo.optimiser_step

    def noted(*arguments: Any) -> Any:
        before = [p.detach().clone() for p in state.model.parameters()]
        found = step(*arguments)
        pairs = zip(before, state.model.parameters(), strict=True)
        seen.append((found["skipped"], all(torch.equal(*pair) for pair in pairs)))
        return found

    monkeypatch.setattr(ppo, "optimiser_step", noted)
    metrics = ppo.ppo_step(run, state, [0, 1, 2], 8)
    assert seen == [(0, False), (1, True), (0, False)]
    assert metrics["skipped"] == 1
    assert math.isnan(metrics["loss"])


def test_demonstrations_are_learned_beside_the_reward(folder: Path) -> None:
    texts = str(write_rows(folder / "texts.jsonl", [{"text": f"The {word}"} for word in WORDS]))
    config = plain_config(folder, ppo={"ptx_data": texts, "ptx_coefficient": 3.0})
    run = make_run(config)
    experience, _ = experience_of(run, rollouts_of(run))
    value = update_gradient(run, experience, range(5), 0)["ptx"][1].loss
    chosen = demonstrations_of(run, 0)
    assert len(chosen) == 4
    assert run.ptx is not None
    losses = []
    for index in chosen:
        group = run.ptx.groups[index]
        ids = torch.tensor([[*group.prompt_ids, *group.response_ids[0]]])
        log_p = run.models.policy(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :, 0])
    expected = torch.cat(losses).mean().item()
    assert value == pytest.approx(3 * expected, rel=1e-4)
    assert demonstrations_of(run, 1) != chosen
    gradients(run.models.trained)
    found = one_update(run, experience, state_of(run), range(5), 0, 8)
    assert found["loss/ptx_avg"] == pytest.approx(expected, rel=1e-4)
    still = replace(config, optim=replace(config.optim, lr=0.0), ppo=replace(config.ppo, epochs=2))
    updates = all_updates(replace(run, config=still), experience, state_of(run), 8)
    assert updates[0]["loss/ptx_avg"] != updates[1]["loss/ptx_avg"], "each update has its own"
    parts = found["loss/policy_avg"] + 0.1 * found["loss/value_avg"] + 3 * found["loss/ptx_avg"]
    assert found["loss"] == pytest.approx(parts)
