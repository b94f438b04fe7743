"""The choices of the policy's loss: gradients beside plain torch, micro-batches, resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.losses import cispo, gspo_clip, ppo_clip
from fastalign.models.load import load_policy
from fastalign.rollouts import SamplingParams
from fastalign.trainers import (
    Cispo,
    Clip,
    ConstantMean,
    DrGrpo,
    Gae,
    Grpo,
    GRPOConfig,
    GRPOSettings,
    Gspo,
    KLInLoss,
    PPOSettings,
    RLOOConfig,
    SequenceMasked,
    SequenceMean,
    TokenMean,
    Truncated,
    Unweighted,
    train_ppo,
)
from fastalign.trainers.ppo.advantages import Importance, LossMean, PolicyObjective
from fastalign.trainers.ppo.train import policy_divisor, update_gradient
from tests.runs.test_resume import assert_same_run
from tests.small_runs import ppo_config, read_metrics
from tests.trainers.dpo.step_cases import gradients
from tests.trainers.ppo.ppo_cases import experience_of, make_run, plain_config, rollouts_of

OBJECTIVES: list[tuple[PolicyObjective, LossMean, Importance, bool]] = [
    (Clip(0.02, 0.04, dual_clip=1.05), SequenceMean(), Unweighted(), False),
    (Gspo(0.01, 0.02), SequenceMean(), Unweighted(), False),
    (Gspo(0.01, None), TokenMean(), Unweighted(), True),
    (Cispo(1.03, 0.98), ConstantMean(), Truncated(1.02, 0.9), True),
    (Clip(), ConstantMean(11), SequenceMasked(1.3, 0.9), False),
]


def eager_loss(run: Any, experience: Any, groups: list[int]) -> Tensor:
    """The policy's loss of an update: single forwards, and the formulas with their means."""
    config, record, policy = run.config, experience.record, run.models.policy
    reference = load_policy(config.model.path)
    kinds = {"clip": ppo_clip, "gspo": gspo_clip, "cispo": cispo}
    loss, samples = config.ppo.loss, config.sampling.num_samples
    function: Any = kinds[loss.name]
    losses = []
    for group in groups:
        for number, ids in enumerate(experience.examples.groups[group].response_ids):
            start, stop = record.bounds[group * samples + number : group * samples + number + 2]
            prompt = experience.examples.groups[group].prompt_ids
            row = torch.tensor([[*prompt, *ids]])
            found = []
            for model in (policy, reference):
                log_p = model(row).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                found.append(log_p.gather(1, torch.tensor(ids)[:, None])[:, 0])
            old = record.logprob[start:stop].double()
            advantage = experience.advantages.advantage[start:stop].double()
            more = (torch.tensor([0, len(ids)]),) if loss.name == "gspo" else ()
            token = function(found[0], old, advantage, *more, **vars(loss))
            if experience.weight is not None:
                token = token * experience.weight[start:stop]
            x = found[0] - found[1].detach()
            kl = ((-x).exp() - 1 + x).clamp(max=10)
            kl = kl * (found[0] - old).exp() if config.kl.by_ratio else kl
            losses.append(token + config.kl.coefficient * kl)
    mean = config.ppo.mean
    if isinstance(mean, SequenceMean):
        return torch.stack([each.mean() for each in losses]).mean()
    if isinstance(mean, ConstantMean):
        length = mean.length or config.sampling.max_new_tokens
        return torch.stack([each.sum() for each in losses]).mean() / length
    return torch.cat(losses).mean()


@pytest.mark.parametrize(("loss", "mean", "importance", "by_ratio"), OBJECTIVES)
def test_an_updates_gradient_is_that_of_plain_torch_however_it_is_cut(
    folder: Path, loss: PolicyObjective, mean: LossMean, importance: Importance, by_ratio: bool
) -> None:
    settings = PPOSettings(
        advantage=DrGrpo(), loss=loss, mean=mean, importance=importance, epochs=1
    )
    config = plain_config(
        folder, ppo=settings, sampling={"num_samples": 3}, kl=KLInLoss(0.2, by_ratio=by_ratio)
    )
    whole = make_run(config)
    rollouts = rollouts_of(whole)
    shifts = [0.0, 0.05, -0.05]  # a sampler that differs from the trainer
    for number, answers in enumerate(rollouts.completions):
        for each in answers:
            each.logprobs[:] = [p + shifts[number % 3] for p in each.logprobs]
    experience, _ = experience_of(whole, rollouts)
    groups, found = [3, 0, 4, 1], []
    for options in ({}, {"tokens_per_batch": 60, "packing": "padded"}, {"max_buffer_bytes": 2**14}):
        run = make_run(config, **options)
        torch.manual_seed(2)
        for parameter in run.models.policy.parameters():  # an earlier update has moved it
            parameter.data.add_(0.004 * torch.randn_like(parameter))
        total = update_gradient(run, experience, groups, 0)["policy"][1]
        found.append((total.loss, gradients(run.models.policy), total.metrics()))
    expected = eager_loss(run, experience, groups)
    expected.backward()
    eager = gradients(run.models.policy)
    for value, gradient, metrics in found:
        assert value == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        for name, true in eager.items():
            size = true.abs().max().item()
            torch.testing.assert_close(gradient[name], true.float(), rtol=2e-3, atol=2e-4 * size)
        assert metrics["policy/clipfrac_avg"] > 0 or loss.name == "clip"


def test_each_mean_has_its_divisor(folder: Path) -> None:
    run = make_run(plain_config(folder, ppo={"advantage": Grpo()}, sampling={"num_samples": 2}))
    experience, _ = experience_of(run, rollouts_of(run))
    lengths = experience.record.bounds.diff().tolist()
    for mean, expected in (
        (TokenMean(), sum(lengths[2:6])),
        (SequenceMean(), 4),
        (ConstantMean(), 4 * 7),
        (ConstantMean(5), 20),
    ):
        changed = replace(run, config=replace(run.config, ppo=replace(run.config.ppo, mean=mean)))
        assert policy_divisor(changed, experience, [1, 2]) == expected


def config_of(kind: Any, folder: Path, run: str, **sections: Any) -> Any:
    """The settings of another command, on the same model, prompts and reward."""
    of_ppo = ppo_config(folder, run)
    return kind(
        model=of_ppo.model,
        data=of_ppo.data,
        reward=of_ppo.reward,
        run=of_ppo.run,
        optim=of_ppo.optim,
        train=replace(of_ppo.train, **sections.pop("train", {})),
        sampling=SamplingParams(max_new_tokens=5, num_samples=3),
        **sections,
    )


def test_a_stopped_grpo_run_equals_a_straight_one(folder: Path) -> None:
    settings = GRPOSettings(
        loss=Gspo(0.01), mean=SequenceMean(), importance=SequenceMasked(), epochs=2, mini_batches=2
    )
    kl = KLInLoss(0.1, by_ratio=True)
    for run, stop in (("straight", None), ("stopped", 3)):
        config = config_of(
            GRPOConfig, folder, run, ppo=settings, kl=kl, train={"stop_at_step": stop}
        )
        train_ppo(config)
    train = replace(config.train, stop_at_step=None)
    train_ppo(replace(config, run=replace(config.run, resume=True), train=train))
    assert_same_run(folder / "straight", folder / "stopped")
    rows = read_metrics(folder / "straight")
    assert not (folder / "straight/value").exists()
    assert all(row["sampling/num_masked"] == 0 for row in rows)
    assert any(row["policy/clipfrac_avg"] > 0 for row in rows)


def test_rloo_raises_the_reward(folder: Path) -> None:
    config = config_of(RLOOConfig, folder, "run", train={"max_steps": 12, "batch_size": 8})
    train_ppo(replace(config, optim=replace(config.optim, lr=3e-3)))
    rewards = [row["reward"] for row in read_metrics(folder / "run")]
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize("kind", [GRPOConfig, RLOOConfig])
def test_a_value_model_is_refused(folder: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"ppo\.advantage: expected one without a value model"):
        config_of(kind, folder, "run", ppo=PPOSettings(advantage=Gae()))
