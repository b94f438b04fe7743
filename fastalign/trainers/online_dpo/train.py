"""Online DPO: preference pairs of the policy's own samples, fresh in every step.

A step samples answers to its prompts from the policy as it stands, scores them, takes each prompt's
best and worst, and takes DPO's steps on these pairs (arXiv 2402.04792, with any reward in place of
the judge; with `reference.refresh_every` the rounds of Llama 3, arXiv 2407.21783, section 4.1).
"""

import random
import time
from contextlib import closing
from functools import partial

import torch

from fastalign.runs.accumulate import accumulate, add_sums, measure_examples
from fastalign.runs.loop import run_loop
from fastalign.runs.metrics import Metrics, mean_metrics
from fastalign.runs.open import opened_run
from fastalign.runs.optimizer import learning_rate
from fastalign.runs.state import TrainState
from fastalign.runs.step import optimiser_step, policy_loss
from fastalign.runs.task import RunResult, Task
from fastalign.trainers.dpo.train import Pairs, logit_sums, make_preference_loss
from fastalign.trainers.online_dpo.config import OnlineDPOConfig
from fastalign.trainers.online_dpo.samples import (
    Online,
    choose_pairs,
    evaluate_samples,
    prepare,
    score_samples,
)
from fastalign.trainers.sampling.collapse import reason_to_stop, watch
from fastalign.trainers.sampling.rollout import rollout_seed


def train_online_dpo(config: OnlineDPOConfig) -> RunResult:
    """Runs online DPO to its end or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    with opened_run(config) as compute:
        online = prepare(config, compute)
        reference = online.reference
        evaluate = None if online.held_out is None else partial(evaluate_samples, online)
        with closing(online.sampler):
            return run_loop(
                config,
                online.model,
                Task(
                    title="online-dpo",
                    num_examples=len(online.prompts.prompts),
                    data_fingerprint=online.prompts.fingerprint,
                    tokenizer=online.tokenizer,
                    world=compute.world,
                    take_step=partial(online_step, online),
                    evaluate=evaluate,
                    reference=None if reference is None else reference.began_as,
                    stop_reason=lambda metrics: reason_to_stop(watched(metrics), config.watch),
                ),
            )


def online_step(
    online: Online, state: TrainState, indices: list[int], num_steps: int
) -> tuple[Metrics, int]:
    """Samples, pairs, updates; returns the step's metrics and the packed tokens of the updates."""
    config = online.config
    if online.reference is not None:
        online.reference.before_step(state)
    online.sampler.version = state.step
    seed = rollout_seed(config.run.seed, "rollouts", state.step)
    scored = score_samples(online, online.prompts, indices, config.sampling, seed)
    fresh = choose_pairs(scored.rollouts.groups, scored.scores, config.pairs.ties)
    counts: Metrics = {
        "num_pairs": len(fresh.groups),
        "num_ties": sum(fresh.ties),
        "num_ties_dropped": fresh.num_ties_dropped,
    }
    counts |= online.sampler.metrics()
    counts |= watch(watched(scored.metrics), config.watch, state.kept)
    if not fresh.groups:
        say_that_all_are_tied(state, len(indices))
        rate = learning_rate(config.optim, state.step, num_steps)
        nothing: Metrics = {"loss": 0.0, "learning_rate": rate, "grad_norm": 0.0, "skipped": 0}
        nothing["time/update_seconds"] = 0.0
        return {**nothing, **scored.metrics, **counts, "num_updates": 0, "num_micro_batches": 0}, 0
    places = torch.tensor(fresh.places)
    margin = (scored.scores[places[:, 0]] - scored.scores[places[:, 1]]).mean().item()
    reference = scored.reference_logprob
    pairs = Pairs(
        measure_examples(fresh.groups, online.compute.packing),
        None if reference is None else reference[places],
        torch.tensor(fresh.ties),
    )
    start = time.perf_counter()
    metrics, num_tokens = update_on(online, pairs, state, num_steps)
    metrics["time/update_seconds"] = time.perf_counter() - start
    online.sampler.version = state.step + 1
    return {**metrics, **scored.metrics, "objective/scores_margin": margin, **counts}, num_tokens


def watched(metrics: Metrics) -> Metrics:
    """What a collapse is told by; a loss without a reference has no KL to watch."""
    return {"objective/kl": 0.0, **metrics}


def say_that_all_are_tied(state: TrainState, num_prompts: int) -> None:
    """One line where a step has no pair; of several such steps in a row, at the first."""
    if state.kept.get("last_step_without_pairs") != state.step - 1:
        print(
            f"step {state.step + 1}: no pair of {num_prompts} prompts (the samples of each have "
            "one score, or are the same); no weight is changed by such a step",
            flush=True,
        )
    state.kept["last_step_without_pairs"] = state.step


def update_on(
    online: Online, pairs: Pairs, state: TrainState, num_steps: int
) -> tuple[Metrics, int]:
    """The updates of a step; the first that is not finite is the last, and changes no weight."""
    config = online.config
    losses: list[float] = []
    updates: list[dict[str, float | int]] = []
    sums: dict[str, float] = {}
    num_tokens = 0
    for indices in mini_batches(config, len(pairs.ties), state.step):
        make_loss = make_preference_loss(config.loss, pairs, len(indices))
        batch_loss = policy_loss(online.model, make_loss, online.compute, logit_sums)
        loss, part, tokens = accumulate(
            pairs.examples, indices, batch_loss, online.compute, backward=True
        )
        losses.append(loss)
        updates.append(optimiser_step(state, loss, config.optim, num_steps))
        add_sums(sums, part)
        num_tokens += tokens
        if updates[-1]["skipped"]:
            break
    return {
        "loss": sum(losses) / len(losses),
        **mean_metrics(sums),
        **updates[-1],
        "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates),
        "num_updates": len(updates),
    }, num_tokens


def mini_batches(config: OnlineDPOConfig, num_pairs: int, step: int) -> list[list[int]]:
    """Which pairs each update takes: a pure function of seed and step."""
    batches = []
    for epoch in range(config.pairs.epochs):
        order = list(range(num_pairs))
        # A string is hashed with SHA-512, so neighbouring steps and epochs are unrelated.
        random.Random(f"{config.run.seed}/pairs/{step}/{epoch}").shuffle(order)
        count = min(config.pairs.mini_batches, num_pairs)
        bounds = [number * num_pairs // count for number in range(count + 1)]
        batches += [order[bounds[i] : bounds[i + 1]] for i in range(count)]
    return batches
