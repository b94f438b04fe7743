"""Online DPO: preference pairs of the policy's own samples, fresh in every step.

A step samples answers to its prompts from the policy as it stands, scores them, takes each prompt's
best and worst, and takes DPO's steps on these pairs (arXiv 2402.04792, with any reward in place of
the judge; with `reference.refresh_every` the rounds of Llama 3, arXiv 2407.21783, section 4.1).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any

import torch

from fastalign.batch.schedule import mini_batches
from fastalign.in_memory import Objects
from fastalign.models.forward import check_same_start
from fastalign.models.load import model_fingerprint
from fastalign.models.reward import RewardScale
from fastalign.progress import phase
from fastalign.runs.accumulate import Total, measure_examples
from fastalign.runs.best import RunResult
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import OpenRun, open_run, with_objects
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


def train_online_dpo(
    config: OnlineDPOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
    reward: Any = None,
) -> RunResult:
    """Run online DPO to its last step or until it is stopped.

    Args:
        config: the settings; None: the defaults. Model, data, reward and folder may be left out.
        model: the policy: a model of transformers, which stays as it is, a folder or a hub name; or
            the result of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: prompts: a `datasets.Dataset`, an iterable of rows (dictionaries), a file, a
            folder or a hub name, with a column `prompt` and those that rewards take.
        eval_data: held-out prompts, or None.
        reference: the reference, given as the model is, with the same tokens; None: the model that
            training starts from.
        reward: a function (prompts, completions, columns by name) -> numbers, a reward model, its
            folder, `module:function` or a .json file; or a list of them.

    Returns:
        The trained policy with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
        UserCodeFailed: if a reward function raises an error.
    """
    with online_dpo_run(
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
def online_dpo_run(
    config: OnlineDPOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
    reward: Any = None,
) -> Iterator["OnlineDPORun"]:
    """Open a run of online DPO, for a loop of one's own: that of `train_online_dpo`.

    The arguments and errors are those of `train_online_dpo`.
    """
    objects = Objects(
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
        reward=reward,
    )
    config = with_objects(OnlineDPOConfig, config, "online-dpo", objects)
    with open_run(config, "online-dpo") as run:
        online = prepare_online_dpo(config, run.compute)
        run.enter_context(closing(online.sampler))
        scale = online.measure_scale() if config.reward.normalise else None

        began_as = None if online.reference is None else online.reference.began_as
        fingerprint = None if began_as is None else model_fingerprint(began_as)
        run.begin(
            online.model,
            online.prompts,
            inputs=online.inputs(fingerprint),
            try_evaluation=lambda: evaluate_samples(
                online.of_first_held_out(run.state.step), scale
            ),
            samples=online.take_samples if config.samples.every else None,
        )
        opened = OnlineDPORun(run, online.model, online.tokenizer)
        opened.setup, opened.scale = online, scale
        yield opened
        opened.end()


class OnlineDPORun(OpenRun):
    """A run of online DPO that has begun.

    Attributes:
        setup: models, sampler, reward sources and prompts.
        scale: scale of the scores, or None.
    """

    setup: OnlineDPOSetup
    scale: RewardScale | None

    def update(self, indices: Sequence[int]) -> Metrics:
        """Sample these prompts, pair the answers, and take all updates; return the metrics.

        A policy that has collapsed for too long ends the run after this step (`watch.stop`).
        """
        online = self.setup
        metrics = online_dpo_step(online, self.scale, self.state, list(indices), self.num_steps)
        self._run.stop(reason_to_stop(watched(metrics), online.config.watch))
        return metrics

    def evaluate(self) -> Metrics:
        """Return metrics named `eval_...` of a sample of each held-out prompt; none without any."""
        if self.setup.held_out is None:
            return {}
        return evaluate_samples(self.setup, self.scale)

    def _finish(self) -> RunResult:
        print_steps_without_signal(self.state)
        return super()._finish()


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
    with phase("updates", config.pairs.epochs * num_pairs, "pairs"):
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
