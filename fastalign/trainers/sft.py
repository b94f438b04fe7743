"""Supervised fine-tuning: the cross-entropy of demonstrated responses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.ranks.config import ParallelConfig
from fastalign.runs.accumulate import Examples, accumulate, evaluate_by_loss, measure_examples
from fastalign.runs.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastalign.runs.data import load_sets
from fastalign.runs.load_models import load_for_training
from fastalign.runs.loop import run_loop
from fastalign.runs.metrics import Metrics, mean_metrics
from fastalign.runs.open import opened_run
from fastalign.runs.step import MakeLoss, policy_loss, supervised
from fastalign.runs.task import RunResult, Task


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def train_sft(config: SFTConfig) -> RunResult:
    """Runs supervised fine-tuning to its end, or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    with opened_run(config) as compute:
        model, tokenizer = load_for_training(config, compute)
        data, held_out = load_sets(config, model, tokenizer)
        examples = measure_examples(data.groups, compute.packing)
        evaluate = None
        if held_out is not None:
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
                world=compute.world,
                take_step=supervised(
                    lambda indices: sft_step(model, examples, indices, compute),
                    config.optim,
                ),
                evaluate=evaluate,
            ),
        )


def num_targets(examples: Examples, indices: Sequence[int]) -> int:
    """Trained tokens of these examples: what the summed loss is divided by."""
    return sum(
        len(examples.groups[i].targets_of(number))
        for i in indices
        for number in range(len(examples.groups[i].response_ids))
    )


def make_sft_loss(normaliser: float) -> MakeLoss:
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
