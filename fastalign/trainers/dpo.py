"""DPO and its relatives: preference pairs straight to a policy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch import PackedBatch
from fastalign.data import (
    TokenizedDataset,
    Tokenizer,
    check_same_vocabulary,
    load_preferences,
)
from fastalign.fused import preference_loss_fn
from fastalign.losses import segment_sum
from fastalign.models import Head, adapter_off
from fastalign.ops.fused_linear_loss import LossFunction
from fastalign.trainers.config import DPOConfig
from fastalign.trainers.evaluate import evaluate_by_loss
from fastalign.trainers.loop import RunResult, Task, indices_of_run, run_loop
from fastalign.trainers.metrics import Metrics, mean_metrics
from fastalign.trainers.preference_losses import PreferenceLoss
from fastalign.trainers.reference_cache import default_cache_dir, reference_logprobs
from fastalign.trainers.setup import check_lengths, load_for_training, load_model, opened_run
from fastalign.trainers.step import (
    Compute,
    Examples,
    MakeLoss,
    accumulate,
    make_compute,
    measure_examples,
)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        reference: (number of pairs, 2) sequence log-probs, NaN where unused; None: no reference.
        ties: (number of pairs,) bool.
    """

    examples: Examples
    reference: Tensor | None
    ties: Tensor


def train_dpo(config: DPOConfig) -> RunResult:
    """Runs DPO, or the relative that `config.loss` is, to its end or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    compute = make_compute(config.train)
    with opened_run(config):
        model, tokenizer = load_for_training(config, compute)
        data = load_data(config, config.data.train, tokenizer)
        check_lengths(model, data)
        used = indices_of_run(config, len(data.groups))
        pairs = prepare(config, model, tokenizer, data, used, compute)
        evaluate = None
        if config.data.eval is not None:
            held_out = load_data(config, config.data.eval, tokenizer)
            check_lengths(model, held_out)
            everything = range(len(held_out.groups))
            held_out_pairs = prepare(config, model, tokenizer, held_out, everything, compute)

            def evaluate() -> Metrics:
                make_loss = make_preference_loss(config.loss, held_out_pairs, len(everything))
                return evaluate_by_loss(
                    model, held_out_pairs.examples, make_loss, compute, logit_sums
                )

        return run_loop(
            config,
            model,
            Task(
                title="dpo",
                num_examples=len(data.groups),
                data_fingerprint=data.fingerprint,
                tokenizer=tokenizer,
                accumulate=lambda indices: dpo_step(model, config.loss, pairs, indices, compute),
                evaluate=evaluate,
            ),
        )


def load_data(config: DPOConfig, source: str, tokenizer: Tokenizer) -> TokenizedDataset:
    """The pairs of a source, under the run's rules; a loss with ties keeps them."""
    return load_preferences(
        source,
        tokenizer,
        max_length=config.data.max_length,
        on_bad_row=config.data.on_bad_row,
        on_too_long=config.data.on_too_long,
        ties="keep" if config.loss.formula().uses_ties else config.data.ties,
    )


def prepare(
    config: DPOConfig,
    policy: Any,
    tokenizer: Tokenizer,
    data: TokenizedDataset,
    used: Iterable[int],
    compute: Compute,
) -> Pairs:
    """Measures the pairs and finds the reference's log-probs of those that will be used.

    Without `reference.path` the policy is the reference: it must still be what it was before the
    first step, unless it has an adapter, which is put off.
    """
    examples = measure_examples(data.groups, compute.packing)
    reference = None
    if config.loss.formula().needs_reference:
        cache = config.reference.cache_dir
        model = load_reference(config, policy, tokenizer, compute)
        with adapter_off(model):
            reference = reference_logprobs(
                model,
                examples,
                used,
                compute,
                data_fingerprint=data.fingerprint,
                cache_dir=default_cache_dir() if cache is None else Path(cache).expanduser(),
            )
    return Pairs(examples, reference, torch.tensor(data.ties))


def load_reference(config: DPOConfig, policy: Any, tokenizer: Tokenizer, compute: Compute) -> Any:
    """The frozen model: another one, or the policy before its first step, its adapter off.

    Raises:
        ValueError: its vocabulary is not the policy's.
    """
    if config.reference.path is None:
        return policy
    model, reference_tokenizer = load_model(config.reference.path, config.model, compute)
    check_same_vocabulary(tokenizer, reference_tokenizer)
    return model


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
def logit_sums(hidden: Tensor, head: Head, batch: PackedBatch) -> dict[str, Tensor]:
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


def dpo_step(
    model: Any, loss: PreferenceLoss, pairs: Pairs, indices: Sequence[int], compute: Compute
) -> tuple[Metrics, int]:
    """Adds one step's gradient; returns its metrics and the packed tokens computed."""
    make_loss = make_preference_loss(loss, pairs, len(indices))
    value, sums, num_tokens = accumulate(
        model, pairs.examples, indices, make_loss, compute, backward=True, measure=logit_sums
    )
    return {"loss": value, **mean_metrics(sums)}, num_tokens
