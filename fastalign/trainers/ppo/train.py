"""PPO, GRPO, RLOO: rollouts, scores, a KL penalty, advantages, then epochs of clipped updates.

A step of the run is one iteration: `train.batch_size` prompts are sampled and scored, and all the
updates on them follow.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.batch.schedule import indices_of_step, mini_batches
from fastalign.in_memory import Objects
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import check_same_start, hidden_and_head
from fastalign.models.load import model_fingerprint, save_model
from fastalign.models.reward import VALUE_HEAD, as_itself, score_of
from fastalign.ops import LinearHead, TokenChunk, kl_penalty
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.ops.segments import segment_sum
from fastalign.progress import phase
from fastalign.runs.accumulate import Total, accumulate, measure_examples, policy_loss
from fastalign.runs.best import RunResult
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import OpenRun, open_run, with_objects
from fastalign.runs.state import TrainState, optimiser_step
from fastalign.trainers.ppo.config import KLInLoss, PolicyGradientConfig, PPOConfig
from fastalign.trainers.ppo.record import (
    Experience,
    FirstUpdate,
    adapted_coefficient,
    both_heads,
    exact_kl_coefficient,
    first_update_can_compute,
    make_experience,
    mean_of_updates,
    measure_experience,
    penalise,
    record_tokens,
    reference_head,
    value_batch_loss,
    value_loss,
)
from fastalign.trainers.ppo.setup import (
    PPOSetup,
    advise_on_estimator,
    advise_on_scale,
    demonstrations_of,
    num_examples_of_updates,
    prepare_ppo,
    save_value,
    scale_of_scores,
    value_source,
)
from fastalign.trainers.sampling.collapse import (
    all_rewards_equal,
    count_without_signal,
    print_steps_without_signal,
    reason_to_stop,
    watch,
)
from fastalign.trainers.sampling.rollout import Rollouts, final_scores, overlapped, rollout_seed
from fastalign.trainers.sft import num_targets, sft_batch_loss

KL_COEFFICIENT = "kl_coefficient"  # among the numbers that a checkpoint holds
VALUE_LOSS = "value_loss"  # among the sums of a policy's batch: the part that its value head has


def train_ppo(
    config: PolicyGradientConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
    reward: Any = None,
) -> RunResult:
    """Run PPO, GRPO or RLOO, by the configuration's class, to its last step or until it is stopped.

    Args:
        config: the settings: a `PPOConfig`, `GRPOConfig` or `RLOOConfig`; None: those of PPO.
            Model, data, reward and folder may be left out.
        model: the policy: a model of transformers, which stays as it is, a folder or a hub name; or
            the result of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: prompts: a `datasets.Dataset`, an iterable of rows (dictionaries), a file, a
            folder or a hub name, with a column `prompt` and those that rewards take.
        eval_data: held-out prompts, or None.
        reference: the frozen reference, given as the model is, with the same tokens; None: the
            model that training starts from.
        reward: a function (prompts, completions, columns by name) -> numbers, a reward model, its
            folder, `module:function` or a .json file; or a list of them.

    Returns:
        The trained policy with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
        UserCodeFailed: if a reward function raises an error.
    """
    with ppo_run(
        config,
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
        reward=reward,
    ) as run:
        for step in run.steps():
            step.finish(run.update(step.indices))
            if step.evaluates:
                step.log(run.evaluate())
        return run.end()


@contextmanager
def ppo_run(
    config: PolicyGradientConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
    reward: Any = None,
) -> Iterator["PPORun"]:
    """Open a run of PPO, RLOO or GRPO, for a loop of one's own: that of `train_ppo`.

    The arguments and errors are those of `train_ppo`.
    """
    objects = Objects(
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
        reward=reward,
    )
    kind = type(config) if isinstance(config, PolicyGradientConfig) else PPOConfig
    config = with_objects(kind, config, kind.command, objects)
    others = ["value"] if config.ppo.advantage.needs_value else []
    with open_run(config, config.command, others) as run:
        advise_on_estimator(config)
        ppo = prepare_ppo(config, run.compute)
        run.enter_context(closing(ppo.sampler))
        models = ppo.models
        other = models.reference is not models.policy

        run.begin(
            models.trained,
            ppo.prompts,
            policy=models.policy,
            inputs=ppo.inputs(model_fingerprint(models.reference) if other else None),
            overlapped=overlapped(ppo.sampler),
            try_evaluation=lambda: evaluate_prompts(ppo.of_first_held_out(run.state.step)),
            samples=ppo.take_samples if config.samples.every else None,
        )
        opened = PPORun(run, models.policy, ppo.tokenizer)
        opened.setup = ppo
        yield opened
        opened.end()


class PPORun(OpenRun):
    """A run of PPO, RLOO or GRPO that has begun.

    Attributes:
        setup: models, sampler, reward sources and prompts.
    """

    setup: PPOSetup

    def update(self, indices: Sequence[int]) -> Metrics:
        """Sample these prompts, score the answers, and take all updates on them.

        A policy that has collapsed for too long ends the run after this step (`watch.stop`).

        Returns:
            The step's metrics.
        """
        metrics = ppo_step(self.setup, self.state, list(indices), self.num_steps)
        self._run.stop(reason_to_stop(metrics, self.setup.config.watch))
        return metrics

    def evaluate(self) -> Metrics:
        """Return metrics named `eval_...` of a sample of each held-out prompt; none without any."""
        return {} if self.setup.held_out is None else evaluate_prompts(self.setup)

    def _finish(self) -> RunResult:
        print_steps_without_signal(self.state)
        models, config = self.setup.models, self.setup.config
        policy, write = models.policy, partial(save_value, models)
        folders = {}
        if models.value is not None:
            assert isinstance(config, PPOConfig)
            folders = {"value": (value_source(config), write)}
        save = partial(save_model, leave_out=(f"{VALUE_HEAD}.weight",))
        result = self._run.end(policy, self.setup.tokenizer, save_model=save, other_folders=folders)
        if models.shares_trunk:  # the caller gets a plain policy
            delattr(policy, VALUE_HEAD)
        return result


def ppo_step(ppo: PPOSetup, state: TrainState, indices: list[int], num_steps: int) -> Metrics:
    """Sample these prompts, score the answers, and take all updates on them; return the metrics."""
    config, start = ppo.config, time.perf_counter()
    rollouts, score = sample_and_score(ppo, state, indices, num_steps)
    scored = time.perf_counter()

    coefficient = state.kept.get(KL_COEFFICIENT, config.kl.coefficient)
    wait = first_update_can_compute(config)
    experience, counted = make_experience(ppo, rollouts, score, coefficient, wait)
    prepared = time.perf_counter()

    with phase("updates", num_examples_of_updates(ppo), "prompts"):
        updates = mean_of_updates(all_updates(ppo, experience, state, num_steps))
    updated = time.perf_counter()
    measured = counted | measure_experience(ppo, experience)
    if state.step == 0 and config.reference.path is None:
        record = experience.record
        ours, theirs = (
            segment_sum(each, record.bounds) for each in (record.logprob, record.reference_logprob)
        )
        check_same_start(ours, theirs, record.bounds.diff().tolist(), ppo.compute)

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
        chosen = indices_of_step(ppo.prompts.mixture, size, following, seed=seed)
        seed = rollout_seed(config.run.seed, "rollouts", following)
        ahead.begin([prompts[i] for i in chosen], config.sampling, seed=seed)
        rollouts.metrics["time/generate_seconds"] += time.perf_counter() - start
    score = final_scores(config.reward, rollouts.rewards, rollouts.ended, scale)
    if state.step == 0:
        advise_on_scale(config, score)
    return rollouts, score


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
            experience = replace(experience, first=None, first_value=None)
    return found


def one_update(
    ppo: PPOSetup,
    experience: Experience,
    state: TrainState,
    groups: Sequence[int],
    number: int,
    num_steps: int,
) -> Metrics:
    """Take one optimiser step on these groups.

    `number` is the update's number within the run, by which demonstrations are drawn.
    """
    terms = update_gradient(ppo, experience, groups, number)
    if experience.first is not None:
        finish_record(ppo, experience, experience.first)
    totals = [total for _, total in terms.values()]
    update = optimiser_step(state, totals, ppo.config.optim, num_steps)
    metrics: Metrics = {"loss": 0.0, "num_packed_tokens": 0, "num_micro_batches": 0}
    for name, (coefficient, total) in terms.items():
        metrics["loss"] += total.loss
        metrics["num_packed_tokens"] += total.num_tokens
        metrics["num_micro_batches"] += int(total.sums.pop("num_micro_batches"))
        metrics[f"loss/{name}_avg"] = total.loss / coefficient
        means = total.metrics()
        metrics |= {k: v for k, v in means.items() if k.startswith(("policy/", "val/"))}
    return metrics | update


def finish_record(ppo: PPOSetup, experience: Experience, first: FirstUpdate) -> None:
    """Write what the first update's gradient has computed into the record and the advantages."""
    config, record, reward = ppo.config, experience.record, experience.reward
    first.finish(ppo.compute.world)
    if first is experience.first and config.kl.in_reward and experience.kl_coefficient:
        reward = penalise(record, experience.score, config.kl, experience.kl_coefficient).reward
    found = config.ppo.advantage.estimate(
        reward, record.value, record.bounds, config.sampling.num_samples
    )
    experience.advantages.advantage.copy_(found.advantage)
    if found.returns is not None and experience.advantages.returns is not None:
        experience.advantages.returns.copy_(found.returns)


def update_gradient(
    ppo: PPOSetup, experience: Experience, groups: Sequence[int], number: int
) -> dict[str, tuple[float, Total]]:
    """Add the gradient of each term of one update's loss: policy, value, demonstrations.

    Returns:
        By the term's name its coefficient and its sums, which hold the coefficient.
    """
    config, models, compute, examples = ppo.config, ppo.models, ppo.compute, experience.examples
    bounds = experience.record.group_bounds
    num_tokens = sum(bounds[group + 1] - bounds[group] for group in groups)
    terms = {}
    if models.value is not None and not models.shares_trunk:
        of_value = partial(value_batch_loss, ppo, experience, num_tokens)
        with as_itself(models.value):
            total = accumulate(models.value, of_value, examples, groups, compute)
        assert isinstance(config, PPOConfig)
        terms["value"] = config.value.coefficient, total
        if experience.first_value is not None:
            finish_record(ppo, experience, experience.first_value)
    of_policy = partial(policy_batch_loss, ppo, experience, policy_divisor(ppo, experience, groups))
    if models.shares_trunk:
        of_policy = partial(shared_batch_loss, of_policy, ppo, experience, num_tokens)
    total = accumulate(models.policy, of_policy, examples, groups, compute, last=ppo.ptx is None)
    if models.shares_trunk:
        assert isinstance(config, PPOConfig)
        of_values = Total(total.sums.pop(VALUE_LOSS))
        total.loss -= of_values.loss
        terms["value"] = config.value.coefficient, of_values
    terms["policy"] = 1.0, total
    if ppo.ptx is not None:
        coefficient, chosen = config.ppo.ptx_coefficient, demonstrations_of(ppo, number)
        normaliser = num_targets(ppo.ptx, chosen) / coefficient
        of_ptx = partial(ptx_batch_loss, ppo, normaliser)
        terms["ptx"] = coefficient, accumulate(models.policy, of_ptx, ppo.ptx, chosen, compute)
    return terms


def policy_divisor(ppo: PPOSetup, experience: Experience, groups: Sequence[int]) -> float:
    """Return what the policy's loss of an update on these groups is divided by."""
    sampling = ppo.config.sampling
    _, bounds = experience.record.responses_of(groups, sampling.num_samples)
    return ppo.config.ppo.mean.divisor(bounds.diff().tolist(), sampling.max_new_tokens)


def shared_batch_loss(
    of_policy: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    ppo: PPOSetup,
    experience: Experience,
    num_tokens: int,
    batch: PackedBatch,
    chosen: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the losses of the policy and of values that its own hidden states give."""
    policy, config = ppo.models.policy, ppo.config
    assert isinstance(config, PPOConfig)
    states = hidden_and_head(policy, batch, ppo.compute)
    loss, sums = of_policy(batch, chosen, states)
    # Of the values' gradient a share goes on into the layers.
    hidden = torch.lerp(states[0].detach(), states[0], config.value.trunk_gradient)
    value = score_of(policy, hidden)
    of_values, more = value_loss(ppo, experience, num_tokens, value, chosen)
    return loss + of_values, sums | more | {VALUE_LOSS: of_values.detach()}


def ptx_batch_loss(
    ppo: PPOSetup, normaliser: float, batch: PackedBatch, chosen: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the demonstrations' loss of a micro-batch, and the sums for its metrics."""
    policy = ppo.models.policy
    loss, sums = sft_batch_loss(policy, normaliser, ppo.compute, batch, chosen)
    if ppo.models.shares_trunk:  # the ranks' last backward must reach every trained parameter
        loss = loss + 0 * getattr(policy, VALUE_HEAD).weight.sum()
    return loss, sums


def policy_batch_loss(
    ppo: PPOSetup,
    experience: Experience,
    divisor: float,
    batch: PackedBatch,
    chosen: list[int],
    states: tuple[Tensor, LinearHead] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the policy's loss of a micro-batch over `divisor`, and sums for the metrics.

    `states` are the policy's `hidden_and_head`, where the caller needs them too.
    """
    _, bounds = experience.record.responses_of(chosen, ppo.config.sampling.num_samples)
    token_weight = ppo.config.ppo.mean.token_weight(bounds)
    if token_weight is not None:
        token_weight = token_weight.to(batch.targets.device, non_blocking=True)
    loss_fn = clipped_loss(ppo, experience, divisor, batch, chosen, bounds, token_weight)
    scale = experience.advantages.scale
    exact = exact_kl_coefficient(ppo.config.kl, experience.kl_coefficient, scale)
    if exact:
        loss, sums, kl = full_kl_loss(ppo, batch, loss_fn, states)
        weighted = kl if token_weight is None else kl * token_weight.to(kl)
        sums["policy/kl_avg"] = kl.detach().sum()
        return loss + exact * weighted.sum() / divisor, sums
    temperature, whole = ppo.config.sampling.temperature, ppo.config.ppo.loss.by_response
    together = experience.first is not None or whole
    segments = experience.record.bounds_of(chosen) if together else None
    found = policy_loss(
        ppo.models.policy,
        batch,
        loss_fn,
        ppo.compute,
        segments=segments,
        temperature=temperature,
        states=states,
    )
    return found.loss, found.sums


def clipped_loss(
    ppo: PPOSetup,
    experience: Experience,
    divisor: float,
    batch: PackedBatch,
    chosen: list[int],
    bounds: Tensor,  # (R + 1,)
    token_weight: Tensor | None,  # (n,)
) -> LossFunction:
    """Return the policy's loss less an entropy bonus, plus a sampled KL if that is in the loss.

    `bounds` are those of the responses of the `chosen` groups, laid end to end.
    """
    settings, kl, record = ppo.config.ppo, ppo.config.kl, experience.record
    rows, device = record.rows_of(chosen), batch.targets.device
    sampled = not kl.in_reward and kl.estimator != "full"
    weight, first = experience.weight, experience.first

    def moved(values: Tensor) -> Tensor:
        return values[rows].to(device, non_blocking=True)

    advantage = moved(experience.advantages.advantage)
    loss_fn = ppo_loss_fn(
        moved(record.logprob) if first is None else None,
        advantage,
        policy_terms=settings.loss.terms,
        response_bounds=bounds.tolist() if settings.loss.by_response else None,
        entropy_coefficient=settings.entropy_coefficient,
        weight=None if weight is None else moved(weight),
        token_weight=token_weight,
        reference_logprob=moved(record.reference_logprob) if sampled else None,
        kl_coefficient=experience.kl_coefficient,
        kl_by_ratio=isinstance(kl, KLInLoss) and kl.by_ratio,
        estimator="k3" if kl.estimator == "full" else kl.estimator,
        normaliser=divisor,
    )
    if first is None:
        return loss_fn

    def first_loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        of_chunk = rows[chunk.row_start : chunk.row_stop]
        first.keep(of_chunk, logprob=chunk.logprob, entropy=chunk.entropy)
        if kl.in_reward and experience.kl_coefficient:
            groups = chosen[chunk.group_start : chunk.group_stop]
            found = group_advantage(ppo, experience, groups, chunk.logprob.detach())
            advantage[chunk.row_start : chunk.row_stop] = found
        return loss_fn(chunk)

    return first_loss_fn


def group_advantage(
    ppo: PPOSetup, experience: Experience, groups: Sequence[int], logprob: Tensor
) -> Tensor:
    """Return the advantages (n,) of these groups' tokens, with the KL in their rewards."""
    record, kl, num_samples = experience.record, ppo.config.kl, ppo.config.sampling.num_samples
    assert kl.estimator != "full"
    responses, bounds = record.responses_of(groups, num_samples)
    bounds = bounds.to(logprob.device)
    found = kl_penalty(
        logprob,
        record.reference_logprob[record.rows_of(groups)].to(logprob),
        bounds,
        experience.score[responses].to(logprob),
        coefficient=experience.kl_coefficient,
        estimator=kl.estimator,
    )
    return ppo.config.ppo.advantage.estimate(found.reward, None, bounds, num_samples).advantage


def full_kl_loss(
    ppo: PPOSetup,
    batch: PackedBatch,
    loss_fn: LossFunction,
    states: tuple[Tensor, LinearHead] | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the loss, sums for its metrics, and the exact KL (n,) over the vocabulary.

    The reference runs on the batch, too; one pass reads both heads.
    """
    models, compute = ppo.models, ppo.compute
    plan = AttentionPlan(batch)
    reference = reference_head(models.reference, batch, compute, plan)
    policy = hidden_and_head(models.policy, batch, compute, plan) if states is None else states
    temperature = ppo.config.sampling.temperature
    found = both_heads(policy, reference, batch.targets, compute, temperature)
    of_all = torch.ones_like(batch.targets, dtype=torch.bool)
    ends = (0, batch.num_targets, 0, batch.num_targets)
    chunk = TokenChunk(found.logprob, found.entropy, ~of_all, of_all, *ends)
    loss, sums = loss_fn(chunk)
    sums = {name: value.detach() for name, value in sums.items()}
    del sums["mean_token_accuracy"]  # this pass does not compare logits
    return loss, sums, found.kl


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
