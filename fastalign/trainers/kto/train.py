"""KTO: answers that were found good or bad, straight to a policy.

An answer counts as a gain by what the policy makes it likelier, beyond what it does to any answer:
the KL of the policy to the reference, which each step estimates on *mismatched* answers. Each
prompt has one, another row's answer. It shares the prompt's tokens where the reference computes
both, and the policy reads the step's mismatched answers before its gradient.
"""

import gc
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.stored import Lazy, stored
from fastalign.compute import Compute
from fastalign.data.load import TokenizedDataset
from fastalign.data.tokenizer import Tokenizer
from fastalign.in_memory import Objects
from fastalign.losses import kto_kl
from fastalign.losses.chunk_losses import kto_loss_fn
from fastalign.models.forward import sequence_logprobs
from fastalign.progress import phase
from fastalign.runs.accumulate import (
    Examples,
    Total,
    accumulate,
    evaluate_by_loss,
    measure_examples,
    policy_loss,
)
from fastalign.runs.best import RunResult
from fastalign.runs.frozen import FrozenModel
from fastalign.runs.inputs import Inputs, indices_of_run, load_for_training, load_sets
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import OpenRun, open_run, with_objects
from fastalign.trainers.dpo.reference import (
    check_start,
    default_cache_dir,
    load_reference,
    reference_logprobs,
)
from fastalign.trainers.kto.config import KTOConfig, KTOLoss


@dataclass(frozen=True)
class Answers:
    """Labelled answers ready to be trained on.

    Attributes:
        examples: groups of one answer each.
        both: groups of the same prompts, each with its answer and a mismatched one.
        mismatched: groups of the same prompts with the mismatched answer alone.
        desirable: (number of answers,) bool.
        reference: (number of answers, 2) sequence log-probs of the reference, of the answer and of
            the mismatched one; NaN where unused.
    """

    examples: Examples
    both: Examples
    mismatched: Sequence[Group]
    desirable: Tensor
    reference: Tensor

    def first(self) -> "Answers":
        """Return the first answer alone."""
        mismatched, desirable = [self.mismatched[0]], self.desirable[:1]
        examples = self.examples.first()
        return replace(self, examples=examples, mismatched=mismatched, desirable=desirable)


def train_kto(
    config: KTOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
) -> RunResult:
    """Run KTO to its last step, or until it is stopped.

    Args:
        config: the settings; None: the defaults. Model, data and folder may be left out of it.
        model: the policy: a model of transformers, which stays as it is, a folder or a hub name; or
            the result of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: answers: a `datasets.Dataset`, an iterable of rows (dictionaries), a file, a
            folder or a hub name. Columns are `prompt`, `completion` and `label` (True or False), or
            those of `train_dpo`, whose pairs are a good and a bad answer.
        eval_data: held-out answers, or None.
        reference: the frozen reference, given as the model is, with the same tokens; None: the
            model that training starts from.

    Returns:
        The trained policy with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with kto_run(
        config,
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
    ) as run:
        for step in run.steps():
            kl = run.estimate_kl(step.indices)
            total = run.gradient(step.indices, kl)
            step.finish(with_margin(run.optimise(total), kl))
            if step.evaluates:
                step.log(run.evaluate())
        return run.end()


@contextmanager
def kto_run(
    config: KTOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
) -> Iterator["KTORun"]:
    """Open a run of KTO, for a loop of one's own: that of `train_kto`.

    The arguments and errors are those of `train_kto`.
    """
    objects = Objects(
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
    )
    config = with_objects(KTOConfig, config, "kto", objects)
    with open_run(config, "kto") as run:
        policy, its_tokenizer = load_for_training(config, run.compute)
        sets = load_sets(config, policy, its_tokenizer)
        advise_on_weights(config.loss, sets[0].labels)
        found = prepare_answers(config, policy, its_tokenizer, sets, run.compute)
        fingerprint, answers, eval_answers = found

        def try_evaluation() -> Metrics:
            assert eval_answers is not None
            return evaluate_answers(policy, config.loss, eval_answers.first(), run.compute)

        run.begin(
            policy,
            sets[0],
            inputs=Inputs(its_tokenizer, sets[1], fingerprint),
            try_evaluation=try_evaluation,
        )
        if run.state.step == 0 and config.reference.path is None:
            check_start(policy, answers.both, answers.reference, run.compute)
        opened = KTORun(run, policy, its_tokenizer)
        opened.loss, opened.answers, opened.eval_answers = config.loss, answers, eval_answers
        yield opened
        opened.end()


class KTORun(OpenRun):
    """A run of KTO that has begun.

    Attributes:
        loss: loss of the settings.
        answers: training answers, as token ids, with the reference's log-probs.
        eval_answers: held-out answers, or None.
    """

    loss: KTOLoss
    answers: Answers
    eval_answers: Answers | None

    def estimate_kl(self, indices: Sequence[int]) -> Tensor:
        """Return the KL to the reference, (), as these answers' mismatched ones show it."""
        return estimate_kl(self.model, self.answers, indices, self.compute)

    def gradient(self, indices: Sequence[int], kl: Tensor) -> Total:
        """Add the gradient of these answers to the policy's; return the sums."""
        return kto_gradient(self.model, self.loss, self.answers, kl, indices, self.compute)

    def evaluate(self) -> Metrics:
        """Return metrics named `eval_...` of the held-out answers; none without any."""
        if self.eval_answers is None:
            return {}
        return evaluate_answers(self.model, self.loss, self.eval_answers, self.compute)


def advise_on_weights(loss: KTOLoss, labels: Sequence[bool | None]) -> None:
    """Print the paper's advice where the classes' weighted numbers are further apart than there."""
    num_good, num_bad = labels.count(True), labels.count(False)
    if not num_good or not num_bad:
        print(f"all {len(labels)} answers are {'good' if num_good else 'bad'}")
        return
    ratio = loss.desirable_weight * num_good / (loss.undesirable_weight * num_bad)
    if not 0.99 <= ratio <= 1.34:
        low = loss.undesirable_weight * num_bad / num_good
        print(
            f"{num_good} good and {num_bad} bad answers weigh {ratio:.3g} to 1; the paper keeps "
            f"this between 1 and 1.33: --loss.desirable-weight {low:.3g} to {low * 4 / 3:.3g}"
        )


def partners(groups: Sequence[Group], seed: int) -> list[int]:
    """Return for each example the one whose answer is mismatched with its prompt.

    It is the next one in a random order that has another prompt, or the next one where there is
    none.
    """
    order = list(range(len(groups)))
    random.Random(f"{seed}/mismatched").shuffle(order)
    size, prompts = len(order), [tuple(groups[index].prompt_ids) for index in order]
    found = [0] * size
    following: int | None = None  # the place of the next other prompt
    for place in reversed(range(2 * size)):
        after = (place + 1) % size
        if prompts[after] != prompts[place % size]:
            following = after
        found[order[place % size]] = order[after if following is None else following]
    return found


def with_mismatched(groups: Sequence[Group], seed: int) -> Sequence[Group]:
    """Return each prompt with its answer and a mismatched one.

    A mismatched answer is cut where its prompt would make it longer than every row is.
    """
    of, most = partners(groups, seed), max(stored(groups).longest())

    def group(index: int) -> Group:
        own, other = groups[index], groups[of[index]]
        room = most - len(own.prompt_ids)
        masks = None
        if own.response_loss_mask is not None or other.response_loss_mask is not None:
            both = (own, other)
            masks = [
                [True] * len(each.response_ids[0])
                if each.response_loss_mask is None
                else each.response_loss_mask[0]
                for each in both
            ]
            masks[1] = masks[1][:room]
        return Group(own.prompt_ids, [own.response_ids[0], other.response_ids[0][:room]], masks)

    return Lazy(len(groups), group)


def only(groups: Sequence[Group], number: int) -> Sequence[Group]:
    """Return the groups with one of their responses."""

    def group(index: int) -> Group:
        whole = groups[index]
        masks = whole.response_loss_mask
        own = None if masks is None else [masks[number]]
        return Group(whole.prompt_ids, [whole.response_ids[number]], own)

    return Lazy(len(groups), group)


def prepare_answers(
    config: KTOConfig,
    policy: Any,
    tokenizer: Tokenizer,
    sets: tuple[TokenizedDataset, TokenizedDataset | None],
    compute: Compute,
) -> tuple[str, Answers, Answers | None]:
    """Find the reference's log-probs; return its fingerprint, training and held-out answers.

    Without `reference.path` the policy is the reference: it must still be what it was before the
    first step, unless it has an adapter, which is switched off.
    """
    data, held_out = sets
    reference = load_reference(config, policy, tokenizer, compute)
    used = indices_of_run(config, data.mixture)
    answers = make_answers(config, data, used, reference, compute)
    eval_answers = None
    if held_out is not None:
        every = range(len(held_out))
        eval_answers = make_answers(config, held_out, every, reference, compute)
    fingerprint = reference.fingerprint
    del reference
    gc.collect()  # offloading makes cycles, which would keep another model's weights
    return fingerprint, answers, eval_answers


def make_answers(
    config: KTOConfig,
    data: TokenizedDataset,
    used: Iterable[int],
    reference: FrozenModel,
    compute: Compute,
) -> Answers:
    """Measure the answers, and find the reference's log-probs of those that will be used.

    Raises:
        ValueError: if there is a single answer.
    """
    seed, cache = config.run.seed, config.reference.cache_dir
    if len(data) < 2:
        raise ValueError(
            f"{data.report.source}: expected at least 2 answers, since the KL is estimated on "
            "those to other prompts, got 1"
        )
    both = measure_examples(with_mismatched(data.groups, seed), compute.packing)
    content = hashlib.sha256(f"{data.fingerprint}/mismatched/{seed}".encode()).hexdigest()
    logprobs = reference_logprobs(
        reference,
        both,
        used,
        compute,
        data_fingerprint=content,
        cache_dir=default_cache_dir() if cache is None else Path(cache).expanduser(),
    )
    desirable = torch.tensor(data.labels, dtype=torch.bool)
    own = measure_examples(data.groups, compute.packing)
    return Answers(own, both, only(both.groups, 1), desirable, logprobs)


def estimate_kl(policy: Any, answers: Answers, indices: Sequence[int], compute: Compute) -> Tensor:
    """Return the KL to the reference, () float64, as the mismatched answers of a step show it."""
    groups = [answers.mismatched[index] for index in indices]
    with phase("mismatched answers", len(groups), "answers"), torch.no_grad():
        logprob = torch.cat(sequence_logprobs(policy, groups, compute))
    return kto_kl(logprob, answers.reference[list(indices), 1])


def kto_gradient(
    policy: Any,
    loss: KTOLoss,
    answers: Answers,
    kl: Tensor,
    indices: Sequence[int],
    compute: Compute,
) -> Total:
    """Add the gradient of one step's answers to the policy's; return the sums."""
    batch_loss = partial(kto_batch_loss, policy, loss, answers, kl, len(indices), compute)
    return accumulate(policy, batch_loss, answers.examples, indices, compute)


def kto_batch_loss(
    policy: Any,
    loss: KTOLoss,
    answers: Answers,
    kl: Tensor,
    normaliser: int,
    compute: Compute,
    batch: PackedBatch,
    chosen: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's loss, and the sums for its metrics.

    `normaliser` is the number of answers of the whole step, which the summed loss is divided by.
    """
    device, bounds = batch.targets.device, batch.layout.target_bounds
    loss_fn = kto_loss_fn(
        bounds,
        answers.reference[chosen, 0].to(device, non_blocking=True),
        answers.desirable[chosen].to(device, non_blocking=True),
        kl.item(),
        beta=loss.beta,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        normaliser=normaliser,
    )
    found = policy_loss(policy, batch, loss_fn, compute, segments=bounds)
    return found.loss, found.sums


def with_margin(metrics: Metrics, kl: Tensor, prefix: str = "") -> Metrics:
    """Return the metrics with the margin of the two classes' mean rewards, and the KL."""
    chosen, rejected = (metrics[f"{prefix}rewards/{name}"] for name in ("chosen", "rejected"))
    more = {f"{prefix}rewards/margins": chosen - rejected, f"{prefix}kl": kl.item()}
    return {**metrics, **more}


def evaluate_answers(policy: Any, loss: KTOLoss, answers: Answers, compute: Compute) -> Metrics:
    """Return metrics named `eval_...` of all the answers."""
    every = range(len(answers.desirable))
    kl = estimate_kl(policy, answers, every, compute)
    batch_loss = partial(kto_batch_loss, policy, loss, answers, kl, len(every), compute)
    found = evaluate_by_loss(policy, batch_loss, answers.examples, compute)
    return with_margin(found, kl, "eval_")
