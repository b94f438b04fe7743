"""Supervised fine-tuning: the cross-entropy of demonstrated responses."""

from collections.abc import Sequence
from typing import Any

from fastalign.batch import PackedBatch
from fastalign.data import TokenizedDataset, Tokenizer, load_sft
from fastalign.fused import sft_loss_fn
from fastalign.ops.fused_linear_loss import LossFunction
from fastalign.trainers.config import SFTConfig
from fastalign.trainers.evaluate import evaluate_by_loss
from fastalign.trainers.loop import RunResult, Task, run_loop
from fastalign.trainers.metrics import Metrics, mean_metrics
from fastalign.trainers.setup import check_lengths, load_for_training, opened_run
from fastalign.trainers.step import (
    Compute,
    Examples,
    MakeLoss,
    accumulate,
    make_compute,
    measure_examples,
    policy_loss,
)


def train_sft(config: SFTConfig) -> RunResult:
    """Runs supervised fine-tuning to its end, or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    compute = make_compute(config.train)
    with opened_run(config):
        model, tokenizer = load_for_training(config, compute)
        data = load_data(config, config.data.train, tokenizer)
        check_lengths(model, data)
        examples = measure_examples(data.groups, compute.packing)
        evaluate = None
        if config.data.eval is not None:
            held_out = load_data(config, config.data.eval, tokenizer)
            check_lengths(model, held_out)
            measured = measure_examples(held_out.groups, compute.packing)

            def evaluate() -> Metrics:
                make_loss = make_sft_loss(num_targets(measured, range(len(measured.groups))))
                return evaluate_by_loss(measured, policy_loss(model, make_loss, compute), compute)

        return run_loop(
            config,
            model,
            Task(
                title="sft",
                num_examples=len(data.groups),
                data_fingerprint=data.fingerprint,
                tokenizer=tokenizer,
                accumulate=lambda indices: sft_step(model, examples, indices, compute),
                evaluate=evaluate,
            ),
        )


def load_data(config: SFTConfig, source: str, tokenizer: Tokenizer) -> TokenizedDataset:
    """The demonstrations of a source, under the run's rules."""
    return load_sft(
        source,
        tokenizer,
        max_length=config.data.max_length,
        on_bad_row=config.data.on_bad_row,
        on_too_long=config.data.on_too_long,
    )


def num_targets(examples: Examples, indices: Sequence[int]) -> int:
    """Trained tokens of these examples: what the summed loss is divided by."""
    return sum(
        len(examples.groups[i].targets_of(number))
        for i in indices
        for number in range(len(examples.groups[i].response_ids))
    )


def make_sft_loss(normaliser: int) -> MakeLoss:
    """The loss function of each micro-batch; tokens need no company, so there are no segments."""

    def make_loss(batch: PackedBatch, chosen: list[int]) -> tuple[LossFunction, None]:
        return sft_loss_fn(normaliser=normaliser), None

    return make_loss


def sft_step(
    model: Any, examples: Examples, indices: Sequence[int], compute: Compute
) -> tuple[Metrics, int]:
    """Adds one step's gradient; returns its metrics and the packed tokens computed."""
    batch_loss = policy_loss(model, make_sft_loss(num_targets(examples, indices)), compute)
    loss, sums, num_tokens = accumulate(examples, indices, batch_loss, compute, backward=True)
    return {"loss": loss, **mean_metrics(sums)}, num_tokens
