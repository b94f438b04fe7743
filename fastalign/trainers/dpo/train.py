"""DPO and its relatives: preference pairs straight to a policy."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.data import TokenizedDataset, Tokenizer
from fastalign.losses.chunk_losses import preference_loss_fn
from fastalign.ops import LinearHead
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.ops.segments import segment_sum
from fastalign.runs.accumulate import Examples, accumulate, evaluate_by_loss, measure_examples
from fastalign.runs.data import load_sets
from fastalign.runs.load_models import load_for_training
from fastalign.runs.loop import indices_of_run, run_loop
from fastalign.runs.metrics import Metrics, mean_metrics
from fastalign.runs.open import opened_run
from fastalign.runs.step import MakeLoss, policy_loss, supervised
from fastalign.runs.task import RunResult, Task
from fastalign.trainers.dpo.config import DPOConfig
from fastalign.trainers.dpo.losses import PreferenceLoss
from fastalign.trainers.dpo.reference import default_cache_dir, load_reference, reference_logprobs


@dataclass(frozen=True)
class Pairs:
    """Preference pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        reference: (number of pairs, 2) sequence log-probs, NaN where unused; None: no reference.
        ties: (number of pairs,) bool.
        fingerprint: of the reference.
    """

    examples: Examples
    reference: Tensor | None
    ties: Tensor
    fingerprint: str | None = None


def train_dpo(config: DPOConfig) -> RunResult:
    """Runs DPO, or the relative that `config.loss` is, to its end or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    with opened_run(config) as compute:
        model, tokenizer = load_for_training(config, compute)
        data, held_out = load_sets(config, model, tokenizer)
        sets: list[tuple[TokenizedDataset, Iterable[int]]] = [
            (data, indices_of_run(config, len(data.groups)))
        ]
        if held_out is not None:
            sets.append((held_out, range(len(held_out.groups))))
        pairs, *others = prepare_all(config, model, tokenizer, sets, compute)
        return run_loop(
            config,
            model,
            Task(
                title="dpo",
                num_examples=len(data.groups),
                data_fingerprint=data.fingerprint,
                tokenizer=tokenizer,
                world=compute.world,
                reference_fingerprint=pairs.fingerprint,
                take_step=supervised(
                    lambda indices: dpo_step(model, config.loss, pairs, indices, compute),
                    config.optim,
                ),
                evaluate=(
                    (lambda: evaluate_pairs(model, config.loss, others[0], compute))
                    if others
                    else None
                ),
            ),
        )


def prepare(
    config: DPOConfig,
    policy: Any,
    tokenizer: Tokenizer,
    data: TokenizedDataset,
    used: Iterable[int],
    compute: Compute,
) -> Pairs:
    """`prepare_all` for one set of pairs."""
    return prepare_all(config, policy, tokenizer, [(data, used)], compute)[0]


def prepare_all(
    config: DPOConfig,
    policy: Any,
    tokenizer: Tokenizer,
    sets: Sequence[tuple[TokenizedDataset, Iterable[int]]],
    compute: Compute,
) -> list[Pairs]:
    """Measures the pairs and finds the reference's log-probs of those that will be used.

    Without `reference.path` the policy is the reference: it must still be what it was before the
    first step, unless it has an adapter, which is put off. Another model is loaded once, and is
    gone when this returns.
    """
    reference = None
    if config.loss.formula().needs_reference:
        reference = load_reference(config, policy, tokenizer, compute)
    cache = config.reference.cache_dir
    cache_dir = default_cache_dir() if cache is None else Path(cache).expanduser()
    prepared = []
    for data, used in sets:
        examples = measure_examples(data.groups, compute.packing)
        logprobs = None
        if reference is not None:
            logprobs = reference_logprobs(
                reference,
                examples,
                used,
                compute,
                data_fingerprint=data.fingerprint,
                cache_dir=cache_dir,
            )
        fingerprint = None if reference is None else reference.fingerprint
        prepared.append(Pairs(examples, logprobs, torch.tensor(data.ties), fingerprint))
    del reference
    gc.collect()  # offloading makes cycles, which would keep another model's weights
    return prepared


def make_preference_loss(loss: PreferenceLoss, pairs: Pairs, normaliser: int) -> MakeLoss:
    """The loss function of each micro-batch; the two responses of a pair stay together."""
    formula = loss.formula()

    def make_loss(batch: PackedBatch, chosen: list[int]) -> tuple[LossFunction, tuple[int, ...]]:
        device = batch.targets.device
        reference = pairs.reference
        bounds = batch.layout.target_bounds
        loss_fn = preference_loss_fn(
            formula,
            bounds,
            None if reference is None else reference[chosen].flatten().to(device),
            normaliser=normaliser,
            tie=pairs.ties[chosen].to(device),
            beta=loss.beta,
        )
        return loss_fn, bounds[::2]

    return make_loss


@torch.no_grad()
def logit_sums(hidden: Tensor, head: LinearHead, batch: PackedBatch) -> dict[str, Tensor]:
    """Mean logits of chosen and rejected tokens, as sums: TRL's `logits/chosen`, `logits/rejected`.

    A model with a softcap has no such metric: its mean needs every logit.
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


def evaluate_pairs(model: Any, loss: PreferenceLoss, pairs: Pairs, compute: Compute) -> Metrics:
    """Metrics named `eval_...` of all the pairs."""
    make_loss = make_preference_loss(loss, pairs, len(pairs.ties))
    batch_loss = policy_loss(model, make_loss, compute, logit_sums)
    return evaluate_by_loss(pairs.examples, batch_loss, compute)


def dpo_step(
    model: Any, loss: PreferenceLoss, pairs: Pairs, indices: Sequence[int], compute: Compute
) -> tuple[Metrics, int]:
    """Adds one step's gradient; returns its metrics and the packed tokens computed."""
    make_loss = make_preference_loss(loss, pairs, len(indices))
    batch_loss = policy_loss(model, make_loss, compute, logit_sums)
    value, sums, num_tokens = accumulate(
        pairs.examples, indices, batch_loss, compute, backward=True
    )
    return {"loss": value, **mean_metrics(sums)}, num_tokens
