"""DPO and its relatives: preference pairs straight to a policy."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.data.load import TokenizedDataset
from fastalign.data.tokenizer import Tokenizer
from fastalign.in_memory import Objects
from fastalign.losses.chunk_losses import PairLoss, preference_loss_fn
from fastalign.losses.formulas import check_pair_loss
from fastalign.ops import LinearHead
from fastalign.ops.segments import segment_sum
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
from fastalign.trainers.dpo.config import DPOConfig, PreferenceLoss
from fastalign.trainers.dpo.reference import (
    check_start,
    default_cache_dir,
    load_reference,
    reference_logprobs,
)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        reference: (number of pairs, 2) sequence log-probs of the reference, NaN where unused; None
            without a reference.
        ties: (number of pairs,) bool.
        fingerprint: fingerprint of the reference, or None.
    """

    examples: Examples
    reference: Tensor | None
    ties: Tensor
    fingerprint: str | None = None

    def first(self) -> "Pairs":
        """Return the first pair alone."""
        return replace(self, examples=self.examples.first(), ties=self.ties[:1])


@dataclass(frozen=True)
class CustomLoss:
    """A preference loss that a caller wrote, in place of one of `LOSSES`.

    Attributes:
        function: function from `PairLogprobs` of B pairs to losses (B,).
        beta: scale of the rewards in the metrics.
    """

    function: PairLoss
    beta: float

    def formula(self) -> PairLoss:
        """Return the function."""
        return self.function


def train_dpo(
    config: DPOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
) -> RunResult:
    """Run DPO, or the relative that `config.loss` names, to its last step or until it is stopped.

    Args:
        config: the settings; None: the defaults. Model, data and folder may be left out of it.
        model: the policy: a model of transformers, which stays as it is, a folder or a hub name; or
            the result of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: pairs: a `datasets.Dataset`, an iterable of rows (dictionaries), a file, a
            folder or a hub name. Columns are `chosen` and `rejected`, with or without `prompt`; or
            `response_a`, `response_b` and `label`.
        eval_data: held-out pairs, or None.
        reference: the frozen reference, given as the model is, with the same tokens; None: the
            model that training starts from.

    Returns:
        The trained policy with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or a model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with dpo_run(
        config,
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
    ) as run:
        for step in run.steps():
            total = run.gradient(step.indices)
            step.finish(run.optimise(total))
            if step.evaluates:
                step.log(run.evaluate())
        return run.end()


@contextmanager
def dpo_run(
    config: DPOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    reference: Any = None,
) -> Iterator["DPORun"]:
    """Open a run of DPO or a relative, for a loop of one's own: that of `train_dpo`.

    The arguments and errors are those of `train_dpo`.
    """
    objects = Objects(
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        reference=reference,
    )
    config = with_objects(DPOConfig, config, "dpo", objects)
    with open_run(config, "dpo") as run:
        policy, its_tokenizer = load_for_training(config, run.compute)
        sets = load_sets(config, policy, its_tokenizer)
        pairs, eval_pairs = prepare_pairs(config, policy, its_tokenizer, sets, run.compute)

        def try_evaluation() -> Metrics:
            assert eval_pairs is not None
            return evaluate_pairs(policy, config.loss, eval_pairs.first(), run.compute)

        run.begin(
            policy,
            sets[0],
            inputs=Inputs(its_tokenizer, sets[1], pairs.fingerprint),
            try_evaluation=try_evaluation,
        )
        if run.state.step == 0 and config.reference.path is None and pairs.reference is not None:
            check_start(policy, pairs.examples, pairs.reference, run.compute)
        opened = DPORun(run, policy, its_tokenizer)
        opened.loss, opened.pairs, opened.eval_pairs = config.loss, pairs, eval_pairs
        yield opened
        opened.end()


class DPORun(OpenRun):
    """A run of DPO or a relative that has begun.

    Attributes:
        loss: loss of the settings.
        pairs: training pairs, as token ids, with the reference's log-probs if that loss has any.
        eval_pairs: held-out pairs, or None.
    """

    loss: PreferenceLoss
    pairs: Pairs
    eval_pairs: Pairs | None

    def gradient(self, indices: Sequence[int], loss: PairLoss | None = None) -> Total:
        """Add the gradient of these pairs to the policy's; return the sums.

        Args:
            indices: the pairs.
            loss: function from `fastalign.losses.PairLogprobs` of B pairs to losses (B,), or a
                formula of a loss of `fastalign.losses`; None: that of the settings.

        Raises:
            ValueError: if `loss` is a bare function of log-probs.
        """
        return dpo_gradient(self.model, self._chosen(loss), self.pairs, indices, self.compute)

    def evaluate(self, loss: PairLoss | None = None) -> Metrics:
        """Return metrics named `eval_...` of the held-out pairs; none without any."""
        if self.eval_pairs is None:
            return {}
        return evaluate_pairs(self.model, self._chosen(loss), self.eval_pairs, self.compute)

    def _chosen(self, loss: PairLoss | None) -> PreferenceLoss | CustomLoss:
        if loss is None:
            return self.loss
        check_pair_loss(loss)
        return CustomLoss(loss, self.loss.beta)


def prepare_pairs(
    config: DPOConfig,
    policy: Any,
    tokenizer: Tokenizer,
    sets: tuple[TokenizedDataset, TokenizedDataset | None],
    compute: Compute,
) -> tuple[Pairs, Pairs | None]:
    """Find the reference's log-probs of the training pairs that will be used, and of held-out ones.

    Without `reference.path` the policy is the reference: it must still be what it was before the
    first step, unless it has an adapter, which is switched off. Another model is loaded once, and
    its memory is free again when this returns.
    """
    data, held_out = sets
    for name, values in (("margins", data.margins), ("votes", data.votes)):
        number = sum(value is not None for value in values)
        if number:
            print(f"{name} of {number} rows are not used by this loss")
    reference = None
    if config.loss.formula().needs_reference:
        reference = load_reference(config, policy, tokenizer, compute)
    pairs = make_pairs(config, data, indices_of_run(config, data.mixture), reference, compute)
    eval_pairs = None
    if held_out is not None:
        eval_pairs = make_pairs(config, held_out, range(len(held_out)), reference, compute)
    del reference
    gc.collect()  # offloading makes cycles, which would keep another model's weights
    return pairs, eval_pairs


def make_pairs(
    config: DPOConfig,
    data: TokenizedDataset,
    used: Iterable[int],
    reference: FrozenModel | None,
    compute: Compute,
) -> Pairs:
    """Measure the pairs, and find the reference's log-probs of those that will be used."""
    examples, ties = measure_examples(data.groups, compute.packing), torch.tensor(data.ties)
    if reference is None:
        return Pairs(examples, None, ties)
    cache = config.reference.cache_dir
    logprobs = reference_logprobs(
        reference,
        examples,
        used,
        compute,
        data_fingerprint=data.fingerprint,
        cache_dir=default_cache_dir() if cache is None else Path(cache).expanduser(),
    )
    return Pairs(examples, logprobs, ties, reference.fingerprint)


def dpo_gradient(
    policy: Any,
    loss: PreferenceLoss | CustomLoss,
    pairs: Pairs,
    indices: Sequence[int],
    compute: Compute,
) -> Total:
    """Add the gradient of one step's pairs to the policy's; return the sums."""
    batch_loss = partial(dpo_batch_loss, policy, loss, pairs, len(indices), compute)
    return accumulate(policy, batch_loss, pairs.examples, indices, compute)


def dpo_batch_loss(
    policy: Any,
    loss: PreferenceLoss | CustomLoss,
    pairs: Pairs,
    normaliser: int,
    compute: Compute,
    batch: PackedBatch,
    chosen: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's preference loss, and the sums for its metrics.

    `normaliser` is the number of pairs of the whole step, which the summed loss is divided by.
    """
    device, bounds = batch.targets.device, batch.layout.target_bounds
    reference = pairs.reference
    loss_fn = preference_loss_fn(
        loss.formula(),
        bounds,
        None if reference is None else reference[chosen].flatten().to(device, non_blocking=True),
        normaliser=normaliser,
        tie=pairs.ties[chosen].to(device, non_blocking=True),
        beta=loss.beta,
    )
    # The two responses of a pair must be in one chunk.
    found = policy_loss(policy, batch, loss_fn, compute, segments=bounds[::2])
    return found.loss, found.sums | logit_sums(found.hidden, found.head, batch)


@torch.no_grad()
def logit_sums(hidden: Tensor, head: LinearHead, batch: PackedBatch) -> dict[str, Tensor]:
    """Return sums for TRL's `logits/chosen` and `logits/rejected`, the tokens' mean logits.

    A model with a softcap has no such metrics: their mean would need every logit.
    """
    if head.softcap is not None:
        return {}
    sums = segment_sum(head.mean_logit(hidden), batch.target_bounds)
    counts = batch.target_bounds.diff()
    return {
        "logits/chosen": sums[0::2].sum(),
        "logits/rejected": sums[1::2].sum(),
        "num_chosen_tokens": counts[0::2].sum(),
        "num_rejected_tokens": counts[1::2].sum(),
    }


def evaluate_pairs(
    policy: Any, loss: PreferenceLoss | CustomLoss, pairs: Pairs, compute: Compute
) -> Metrics:
    """Return metrics named `eval_...` of all the pairs."""
    batch_loss = partial(dpo_batch_loss, policy, loss, pairs, len(pairs.ties), compute)
    return evaluate_by_loss(policy, batch_loss, pairs.examples, compute)
