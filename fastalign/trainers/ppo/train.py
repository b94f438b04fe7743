"""PPO: rollouts, scores, a KL penalty, advantages, then epochs of clipped updates.

A step of the run is one iteration: `train.batch_size` prompts are sampled and scored, and all the
updates on them follow.
"""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial

from torch import Tensor

from fastalign.batch.schedule import indices_of_step, mini_batches
from fastalign.losses import importance_weight
from fastalign.models import fingerprint_or_none, save_reward_model
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.loop import RunResult
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import open_run
from fastalign.runs.state import TrainState
from fastalign.trainers.ppo.config import PPOConfig
from fastalign.trainers.ppo.record import (
    adapted_coefficient,
    objective_metrics,
    penalise,
    record_tokens,
    sampling_metrics,
    value_metrics,
)
from fastalign.trainers.ppo.setup import PPOSetup, prepare_ppo, scale_of_scores
from fastalign.trainers.ppo.update import Experience, mean_of_updates, one_update
from fastalign.trainers.sampling.collapse import (
    all_rewards_equal,
    count_without_signal,
    print_steps_without_signal,
    reason_to_stop,
    repeated_ratio,
    watch,
)
from fastalign.trainers.sampling.policy_sampler import overlapped
from fastalign.trainers.sampling.rollout import Rollouts, final_scores, rollout_seed

KL_COEFFICIENT = "kl_coefficient"  # among the numbers that a checkpoint holds


def train_ppo(config: PPOConfig) -> RunResult:
    """Run PPO to its last step, or until it is stopped.

    Raises:
        ValueError: if a setting, a file or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    others = ["value"] if config.ppo.advantage.needs_value else []
    with open_run(config, "ppo", others) as run:
        advise_on_estimator(config)
        ppo = prepare_ppo(config, run.compute)
        run.enter_context(closing(ppo.sampler))
        models = ppo.models
        frozen = None if models.reference is models.policy else models.reference

        run.begin(
            models.trained,
            ppo.prompts,
            policy=models.policy,
            inputs=ppo.inputs(fingerprint_or_none(frozen)),
            overlapped=overlapped(ppo.sampler),
        )
        for step in run.steps():
            metrics = ppo_step(ppo, run.state, step.indices, run.num_steps)
            step.finish(metrics)
            run.stop(reason_to_stop(metrics, config.watch))
            if step.evaluates and ppo.held_out is not None:
                step.log(evaluate_prompts(ppo))
        print_steps_without_signal(run.state)
        value_folder = {}
        if models.value is not None:
            value_folder["value"] = partial(save_reward_model, models.value, models.value_tokenizer)
        return run.end(models.policy, ppo.tokenizer, other_folders=value_folder)


def ppo_step(ppo: PPOSetup, state: TrainState, indices: list[int], num_steps: int) -> Metrics:
    """Sample these prompts, score the answers, and take all updates on them; return the metrics."""
    config, start = ppo.config, time.perf_counter()
    rollouts, score = sample_and_score(ppo, state, indices, num_steps)
    scored = time.perf_counter()

    coefficient = state.kept.get(KL_COEFFICIENT, config.kl.coefficient)
    experience, measured = make_experience(ppo, rollouts, score, coefficient)
    prepared = time.perf_counter()

    updates = mean_of_updates(all_updates(ppo, experience, state, num_steps))
    updated = time.perf_counter()

    ppo.sampler.version = state.step + 1
    state.kept[KL_COEFFICIENT] = adapted_coefficient(
        coefficient, float(measured["objective/kl"]), config.kl, len(score)
    )
    counts = {
        name: int(measured.pop(name) + updates.pop(name))
        for name in ("num_packed_tokens", "num_micro_batches")
    }
    metrics = {
        **updates,
        **rollouts.metrics,
        **ppo.sampler.metrics(),
        **measured,
        "time/prepare_seconds": prepared - scored,
        "time/update_seconds": updated - prepared,
        "val/num_eos_tokens": int(rollouts.ended.sum()),
        **counts,
        "lr": updates["learning_rate"],
        "episode": (state.step + 1) * len(score),
    }
    metrics |= watch(metrics, config.watch, state.kept)
    metrics |= count_without_signal(state, no_signal(ppo, rollouts, experience))
    metrics["eps"] = len(score) / (time.perf_counter() - start)
    return metrics


def sample_and_score(
    ppo: PPOSetup, state: TrainState, indices: list[int], num_steps: int
) -> tuple[Rollouts, Tensor]:
    """Sample the policy as it is; return the rollouts and their scores (R,).

    A sampler that overlaps also begins to sample the next step's prompts.
    """
    config, sampler = ppo.config, ppo.sampler
    sampler.version = state.step
    ahead = overlapped(sampler)
    if ahead is not None and state.rollouts:  # a resumed run's
        ahead.restore(state.rollouts)
        state.rollouts = {}
    scale = scale_of_scores(ppo, state)
    rollouts = ppo.roll_out(indices, state.step)
    if ahead is not None and state.step + 1 < num_steps:
        start = time.perf_counter()
        prompts, following = ppo.prompts.prompt_ids, state.step + 1
        size, seed = config.train.batch_size, config.run.seed
        chosen = indices_of_step(len(prompts), size, following, seed=seed)
        seed = rollout_seed(config.run.seed, "rollouts", following)
        ahead.begin([prompts[i] for i in chosen], config.sampling, seed=seed)
        rollouts.metrics["time/generate_seconds"] += time.perf_counter() - start
    score = final_scores(config.reward, rollouts.rewards, rollouts.ended, scale)
    if state.step == 0:
        advise_on_scale(config, score)
    return rollouts, score


def make_experience(
    ppo: PPOSetup, rollouts: Rollouts, score: Tensor, coefficient: float
) -> tuple[Experience, Metrics]:
    """Compute log-probs, values, rewards and advantages of the rollouts, before any update.

    `score` (R,) is of each response.

    Returns:
        The experience, and metrics of it, `num_packed_tokens` and `num_micro_batches` among them.
    """
    config = ppo.config
    examples = measure_examples(rollouts.groups, ppo.compute.packing)
    record, counts = record_tokens(
        ppo.models,
        rollouts,
        examples,
        ppo.compute,
        temperature=config.sampling.temperature,
        full_kl=config.kl.estimator == "full",
    )
    penalised = penalise(record, score, config.kl, coefficient)
    advantages = config.ppo.advantage.estimate(
        penalised.reward, record.value, record.bounds, config.sampling.num_samples
    )
    most = config.ppo.max_importance_weight
    weight = None
    if most is not None:
        weight = importance_weight(record.logprob, record.sampler_logprob, max_weight=most)
    responses = [ids for group in examples.groups for ids in group.response_ids]
    return Experience(examples, record, advantages, coefficient, weight), {
        **counts,
        **objective_metrics(record, penalised, score, config.kl, coefficient),
        **sampling_metrics(record),
        **value_metrics(record, advantages.returns),
        "completions/repeated_ratio": repeated_ratio(responses),
    }


def no_signal(ppo: PPOSetup, rollouts: Rollouts, experience: Experience) -> str | None:
    """Return why a step teaches the policy nothing, or None.

    A value model is the baseline of all prompts, which are then compared with each other.
    """
    needs_value = ppo.config.ppo.advantage.needs_value
    if all_rewards_equal(rollouts.rewards, 1 if needs_value else ppo.config.sampling.num_samples):
        of = "" if needs_value else "each prompt's "
        return f"the rewards of all {of}completions are equal; such a step has no learning signal"
    if not bool(experience.advantages.advantage.any()):
        return "all advantages are zero; such a step has no learning signal"
    return None


def all_updates(
    ppo: PPOSetup, experience: Experience, state: TrainState, num_steps: int
) -> list[Metrics]:
    """Take every update of a step, in epochs of mini-batches; return the metrics of each."""
    settings, seed = ppo.config.ppo, ppo.config.run.seed
    num_groups = len(experience.examples.groups)
    number = state.step * settings.epochs * settings.mini_batches
    found: list[Metrics] = []
    for epoch in range(settings.epochs):
        order = f"{seed}/updates/{state.step}/{epoch}"
        for groups in mini_batches(num_groups, settings.mini_batches, order):
            update = one_update(ppo, experience, state, groups, number + len(found), num_steps)
            found.append(update)
    return found


def evaluate_prompts(ppo: PPOSetup) -> Metrics:
    """Return reward, KL, entropy and lengths of held-out prompts' samples, as `eval_...`."""
    config = ppo.config
    rollouts = ppo.roll_out_held_out()
    record, _ = record_tokens(
        replace(ppo.models, value=None),
        rollouts,
        measure_examples(rollouts.groups, ppo.compute.packing),
        ppo.compute,
        temperature=config.sampling.temperature,
        full_kl=config.kl.estimator == "full",
    )
    found = penalise(record, rollouts.rewards.float(), config.kl, 0.0)
    metrics = {
        **rollouts.metrics,
        **ppo.sampler.metrics(),
        "objective/kl": found.sequence_kl.mean().item(),
        "entropy": record.entropy.mean().item(),
    }
    return {f"eval_{name}": value for name, value in metrics.items()}


def advise_on_scale(config: PPOConfig, score: Tensor) -> None:
    """Warn if the scores' deviation exceeds 10 x `value.clip_range`: values could not catch up."""
    spread, step = score.std(correction=0).item(), config.value.clip_range
    if config.ppo.advantage.needs_value and spread > 10 * step:
        print(
            f"scores have a standard deviation of {spread:.3g}, and a value moves by at most "
            f"{step:g} a step (value.clip_range); --reward.normalise brings scores to 1",
            flush=True,
        )


def advise_on_estimator(config: PPOConfig) -> None:
    """Warn if the KL in the reward has a biased gradient."""
    kl = config.kl
    if kl.in_reward and kl.estimator in ("k2", "k3") and kl.coefficient:
        print(
            f"kl.estimator={kl.estimator} in the reward gives a biased KL gradient and may let the "
            "policy drift; use k1 or full, or put the KL into the loss (--kl loss)",
            flush=True,
        )
