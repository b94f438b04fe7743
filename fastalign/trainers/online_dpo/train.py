"""Online DPO: preference pairs of the policy's own samples, fresh in every step.

A step samples answers to its prompts from the policy as it stands, scores them, takes each prompt's
best and worst, and takes DPO's steps on these pairs (arXiv 2402.04792, with any reward in place of
the judge; with `reference.refresh_every` the rounds of Llama 3, arXiv 2407.21783, section 4.1).
"""

import time
from contextlib import closing
from itertools import chain

import torch

from fastalign.batch.schedule import mini_batches
from fastalign.models.forward import check_same_start
from fastalign.models.load import model_fingerprint
from fastalign.models.reward import RewardScale
from fastalign.runs.accumulate import Total, measure_examples
from fastalign.runs.loop import RunResult
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import open_run
from fastalign.runs.state import TrainState, learning_rate, optimiser_step
from fastalign.trainers.dpo.train import Pairs, dpo_gradient
from fastalign.trainers.online_dpo.config import OnlineDPOConfig
from fastalign.trainers.online_dpo.samples import (
    OnlineDPOSetup,
    choose_pairs,
    evaluate_samples,
    prepare_online_dpo,
    score_samples,
)
from fastalign.trainers.sampling.collapse import (
    count_without_signal,
    print_steps_without_signal,
    reason_to_stop,
    watch,
)


def train_online_dpo(config: OnlineDPOConfig) -> RunResult:
    """Run online DPO to its last step or until it is stopped.

    Raises:
        ValueError: if a setting, a file or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with open_run(config, "online-dpo") as run:
        online = prepare_online_dpo(config, run.compute)
        run.enter_context(closing(online.sampler))
        scale = online.measure_scale() if config.reward.normalise else None

        began_as = None if online.reference is None else online.reference.began_as
        fingerprint = None if began_as is None else model_fingerprint(began_as)
        run.begin(online.model, online.prompts, inputs=online.inputs(fingerprint))
        for step in run.steps():
            metrics = online_dpo_step(online, scale, run.state, step.indices, run.num_steps)
            step.finish(metrics)
            run.stop(reason_to_stop(watched(metrics), config.watch))
            if step.evaluates and online.held_out is not None:
                step.log(evaluate_samples(online, scale))
        print_steps_without_signal(run.state)
        return run.end(online.model, online.tokenizer)


def online_dpo_step(
    online: OnlineDPOSetup,
    scale: RewardScale | None,
    state: TrainState,
    indices: list[int],
    num_steps: int,
) -> Metrics:
    """Sample these prompts, pair the answers, take the updates on the pairs; return the metrics."""
    config = online.config
    if online.reference is not None:
        online.reference.before_step(state)
    online.sampler.version = state.step
    scored = score_samples(online, online.roll_out(indices, state.step), scale)
    if state.step == 0 and scored.reference_logprob is not None and config.reference.path is None:
        counts_of = [len(ids) for group in scored.rollouts.groups for ids in group.response_ids]
        check_same_start(scored.logprob, scored.reference_logprob, counts_of, online.compute)
    fresh = choose_pairs(scored.rollouts.groups, scored.scores, config.pairs.ties)
    counts: Metrics = {
        "num_pairs": len(fresh.groups),
        "num_ties": sum(fresh.ties),
        "num_ties_dropped": fresh.num_ties_dropped,
    }
    counts |= online.sampler.metrics()
    counts |= watch(watched(scored.metrics), config.watch, state.kept)
    no_pair = (
        f"no pair of {len(indices)} prompts (the samples of each have one score, or are the same); "
        "no weight is changed by such a step"
    )
    counts |= count_without_signal(state, None if fresh.groups else no_pair)
    if not fresh.groups:
        rate = learning_rate(config.optim, state.step, num_steps)
        return {**NO_UPDATE, "learning_rate": rate, **scored.metrics, **counts}
    places = torch.tensor(fresh.places)
    margin = (scored.scores[places[:, 0]] - scored.scores[places[:, 1]]).mean().item()
    reference = scored.reference_logprob
    pairs = Pairs(
        measure_examples(fresh.groups, online.compute.packing),
        None if reference is None else reference[places],
        torch.tensor(fresh.ties),
    )
    start = time.perf_counter()
    metrics = update_on(online, pairs, state, num_steps)
    metrics["time/update_seconds"] = time.perf_counter() - start
    online.sampler.version = state.step + 1
    return {**metrics, **scored.metrics, "objective/scores_margin": margin, **counts}


# Metrics of a step without a pair.
NO_UPDATE: Metrics = {
    "loss": 0.0,
    "grad_norm": 0.0,
    "skipped": 0,
    "time/update_seconds": 0.0,
    "num_updates": 0,
    "num_micro_batches": 0,
    "num_packed_tokens": 0,
}


def watched(metrics: Metrics) -> Metrics:
    """Add a KL of 0 for a loss without a reference, which has no KL to watch."""
    return {"objective/kl": 0.0, **metrics}


def update_on(online: OnlineDPOSetup, pairs: Pairs, state: TrainState, num_steps: int) -> Metrics:
    """Take the updates of a step; stop at the first that is not finite, which changes no weight."""
    config = online.config
    whole = Total(sums={})
    losses: list[float] = []
    updates: list[dict[str, float | int]] = []
    num_pairs, count = len(pairs.ties), config.pairs.mini_batches
    order = f"{config.run.seed}/pairs/{state.step}"
    epochs = [mini_batches(num_pairs, count, f"{order}/{e}") for e in range(config.pairs.epochs)]
    for indices in chain.from_iterable(epochs):
        total = dpo_gradient(online.model, config.loss, pairs, indices, online.compute)
        updates.append(optimiser_step(state, [total], config.optim, num_steps))
        losses.append(total.loss)
        whole.add(total)
        if updates[-1]["skipped"]:
            break
    whole.loss = sum(losses) / len(losses)
    return {
        **whole.metrics(),
        **updates[-1],
        "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates),
        "num_updates": len(updates),
        "num_packed_tokens": whole.num_tokens,
    }
