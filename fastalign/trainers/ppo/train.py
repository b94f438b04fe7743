"""PPO: rollouts, scores, a KL penalty, advantages, then epochs of clipped updates.

A step is one iteration: `train.batch_size` prompts are sampled and scored, and all the updates on
them follow.
"""

import time
from contextlib import closing
from dataclasses import replace

from torch import Tensor

from fastalign.batch.schedule import indices_of_step
from fastalign.rollouts import OverlappedSampler, RankZeroSampler
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.loop import run_loop
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import opened_run
from fastalign.runs.state import TrainState
from fastalign.runs.task import RunResult, Task
from fastalign.trainers.ppo.advantages import (
    adapted_coefficient,
    find_advantages,
    objective_metrics,
    penalise,
    sampling_metrics,
    value_metrics,
)
from fastalign.trainers.ppo.config import PPOConfig
from fastalign.trainers.ppo.prepare import PPORun, prepare, scale_of_scores
from fastalign.trainers.ppo.record import record_tokens
from fastalign.trainers.ppo.update import (
    Update,
    all_updates,
    find_exact_kl_coefficient,
    mean_of_updates,
)
from fastalign.trainers.sampling.collapse import reason_to_stop, repeated_ratio, watch
from fastalign.trainers.sampling.policy_sampler import overlapped
from fastalign.trainers.sampling.rollout import Rollouts, roll_out, rollout_seed
from fastalign.trainers.sampling.score import final_scores

KL_COEFFICIENT = "kl_coefficient"  # among the numbers that a checkpoint keeps


def train_ppo(config: PPOConfig) -> RunResult:
    """Runs PPO to its end, or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    with opened_run(config) as compute:
        advise_on_estimator(config)
        run = prepare(config, compute)
        evaluate = None if run.held_out is None else (lambda: evaluate_prompts(run))
        models = run.models
        with closing(run.sampler):
            return run_loop(
                config,
                models.trained,
                Task(
                    title="ppo",
                    num_examples=len(run.prompts.prompts),
                    data_fingerprint=run.prompts.fingerprint,
                    tokenizer=run.tokenizer,
                    world=compute.world,
                    take_step=lambda *step: ppo_step(run, *step),
                    evaluate=evaluate,
                    policy=models.policy,
                    reference=models.frozen,
                    other_folders={} if models.value is None else {"value": models.save_value},
                    stop_reason=lambda metrics: reason_to_stop(metrics, config.watch),
                    before_save=lambda state: keep_rollouts(run, state),
                ),
            )


def ppo_step(
    run: PPORun, state: TrainState, indices: list[int], num_steps: int
) -> tuple[Metrics, int]:
    """Rollouts of these prompts and all updates on them; metrics and packed tokens computed."""
    config, start = run.config, time.perf_counter()
    run.sampler.version = state.step
    ahead = overlapped(run.sampler)
    if ahead is not None and state.rollouts:
        ahead.restore(state.rollouts)
        state.rollouts = {}
    scale = scale_of_scores(run, state)
    seed = rollout_seed(config.run.seed, "rollouts", state.step)
    rollouts = roll_out(
        run.sampler, run.prompts, indices, config.sampling, run.tokenizer, run.sources, seed=seed
    )
    generated = time.perf_counter()
    if ahead is not None and state.step + 1 < num_steps:
        begin_next_step(run, ahead, state.step + 1)
    begun = time.perf_counter() - generated
    score = final_scores(config.reward, rollouts.rewards, rollouts.ended, scale)
    if state.step == 0:
        advise_on_scale(config, score)
    coefficient = state.kept.get(KL_COEFFICIENT, config.kl.coefficient)
    scored = time.perf_counter()
    update, measured = prepare_update(run, rollouts, score, coefficient)
    prepared = time.perf_counter()
    updates = mean_of_updates(all_updates(update, state, num_steps))
    run.sampler.version = state.step + 1
    state.kept[KL_COEFFICIENT] = adapted_coefficient(
        coefficient, float(measured["objective/kl"]), config.kl, len(score)
    )
    counts = {
        name: measured.pop(name) + updates.pop(name)
        for name in ("num_packed_tokens", "num_micro_batches")
    }
    episode = (state.step + 1) * len(score)
    metrics = {
        **updates,
        **rollouts.metrics,
        **run.sampler.metrics(),
        **measured,
        "time/generate_seconds": rollouts.metrics["time/generate_seconds"] + begun,
        "time/prepare_seconds": prepared - scored,
        "time/update_seconds": time.perf_counter() - prepared,
        "val/num_eos_tokens": int(rollouts.ended.sum()),
        "num_micro_batches": counts["num_micro_batches"],
        "lr": updates["learning_rate"],
        "episode": episode,
    }
    metrics |= watch(metrics, config.watch, state.kept)
    metrics["eps"] = len(score) / (time.perf_counter() - start)
    return metrics, int(counts["num_packed_tokens"])


def begin_next_step(run: PPORun, sampler: OverlappedSampler | RankZeroSampler, step: int) -> None:
    """Has a step's prompts answered by the policy as it is, while it trains on others."""
    config, prompts = run.config, run.prompts.prompt_ids
    indices = indices_of_step(len(prompts), config.train.batch_size, step, seed=config.run.seed)
    seed = rollout_seed(config.run.seed, "rollouts", step)
    sampler.begin([prompts[i] for i in indices], config.sampling, seed=seed)


def keep_rollouts(run: PPORun, state: TrainState) -> None:
    """What was begun for the next step belongs to a checkpoint."""
    ahead = overlapped(run.sampler)
    if ahead is not None:
        state.rollouts = ahead.state()


def advise_on_scale(config: PPOConfig, score: Tensor) -> None:
    """Says it where values, which are clipped to small steps, could never reach such scores."""
    spread, step = score.std(correction=0).item(), config.value.clip_range
    if config.ppo.advantage == "gae" and spread > 10 * step:
        print(
            f"scores have a standard deviation of {spread:.3g}, and a value moves by at most "
            f"{step:g} a step (value.clip_range); --reward.normalise brings scores to 1",
            flush=True,
        )


def advise_on_estimator(config: PPOConfig) -> None:
    """Says it where a penalty is not what holds the policy near the reference."""
    kl = config.kl
    if kl.place == "reward" and kl.estimator in ("k2", "k3") and kl.coefficient:
        print(
            f"{kl.estimator} in the reward has not the KL's gradient and may not hold the policy; "
            "k1 and full have it (--kl.estimator), or put it into the loss (--kl.place loss)",
            flush=True,
        )


def prepare_update(
    run: PPORun, rollouts: Rollouts, score: Tensor, coefficient: float
) -> tuple[Update, Metrics]:
    """Log-probs, values, rewards and advantages of the rollouts, and what they measure."""
    config = run.config
    examples = measure_examples(rollouts.groups, run.compute.packing)
    record, counts = record_tokens(
        run.models,
        rollouts,
        examples,
        run.compute,
        temperature=config.sampling.temperature,
        full_kl=config.kl.estimator == "full",
    )
    found = penalise(record, score, config.kl, coefficient)
    aims = find_advantages(record, found.reward, config.ppo, config.sampling.num_samples)
    update = Update(
        config=config,
        compute=run.compute,
        models=run.models,
        examples=examples,
        record=record,
        advantage=aims.advantage,
        returns=aims.returns,
        kl_coefficient=coefficient,
        exact_kl_coefficient=find_exact_kl_coefficient(config.kl, coefficient, aims.scale),
        ptx=run.ptx,
    )
    responses = [ids for group in examples.groups for ids in group.response_ids]
    return update, {
        **counts,
        **objective_metrics(record, found, score, config.kl, coefficient),
        **sampling_metrics(record),
        **value_metrics(record, aims.returns),
        "completions/repeated_ratio": repeated_ratio(responses),
    }


def evaluate_prompts(run: PPORun) -> Metrics:
    """Reward, KL, entropy and lengths of one sample of each held-out prompt, named `eval_...`.

    The seed is the same at every step, so that evaluations differ by the policy alone.
    """
    assert run.held_out is not None
    config = run.config
    rollouts = roll_out(
        run.sampler,
        run.held_out,
        range(len(run.held_out.prompts)),
        replace(config.sampling, num_samples=1),
        run.tokenizer,
        run.sources,
        seed=rollout_seed(config.run.seed, "eval", 0),
    )
    record, _ = record_tokens(
        replace(run.models, value=None),
        rollouts,
        measure_examples(rollouts.groups, run.compute.packing),
        run.compute,
        temperature=config.sampling.temperature,
        full_kl=config.kl.estimator == "full",
    )
    found = penalise(record, rollouts.rewards.float(), config.kl, 0.0)
    metrics = {
        **rollouts.metrics,
        **run.sampler.metrics(),
        "objective/kl": found.sequence_kl.mean().item(),
        "entropy": record.entropy.mean().item(),
    }
    return {f"eval_{name}": value for name, value in metrics.items()}
