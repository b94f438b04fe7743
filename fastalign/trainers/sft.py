"""Supervised fine-tuning: the cross-entropy of demonstrated responses."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.runs.accumulate import (
    Examples,
    Total,
    accumulate,
    evaluate_by_loss,
    measure_examples,
    policy_loss,
)
from fastalign.runs.config import SFTConfig
from fastalign.runs.inputs import Inputs, load_for_training, load_sets
from fastalign.runs.loop import RunResult
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import open_run


def train_sft(config: SFTConfig) -> RunResult:
    """Run supervised fine-tuning until its last step, or until it is stopped.

    Raises:
        ValueError: if a setting, a file or the model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with open_run(config, "sft") as run:
        model, tokenizer = load_for_training(config, run.compute)
        data, held_out = load_sets(config, model, tokenizer)
        examples = measure_examples(data.groups, run.compute.packing)
        if held_out is not None:
            eval_examples = measure_examples(held_out.groups, run.compute.packing)

        run.begin(model, data, inputs=Inputs(tokenizer, held_out))
        for step in run.steps():
            total = sft_gradient(model, examples, step.indices, run.compute)
            step.finish(run.optimise(total))
            if step.evaluates and held_out is not None:
                step.log(evaluate_sft(model, eval_examples, run.compute))
        return run.end(model, tokenizer)


def num_targets(examples: Examples, indices: Sequence[int]) -> int:
    """Return the number of trained tokens of these examples, the loss's divisor."""
    return sum(
        len(examples.groups[i].target_positions(number))
        for i in indices
        for number in range(len(examples.groups[i].response_ids))
    )


def sft_gradient(model: Any, examples: Examples, indices: Sequence[int], compute: Compute) -> Total:
    """Add the gradient of one step's examples to the model's; return the sums."""
    batch_loss = partial(sft_batch_loss, model, num_targets(examples, indices), compute)
    return accumulate(model, batch_loss, examples, indices, compute)


def sft_batch_loss(
    model: Any, normaliser: float, compute: Compute, batch: PackedBatch, chosen: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's cross-entropy over `normaliser`, and the sums for its metrics."""
    found = policy_loss(model, batch, sft_loss_fn(normaliser=normaliser), compute)
    return found.loss, found.sums


def evaluate_sft(model: Any, examples: Examples, compute: Compute) -> Metrics:
    """Return metrics named `eval_...` of all the examples."""
    normaliser = num_targets(examples, range(len(examples.groups)))
    batch_loss = partial(sft_batch_loss, model, normaliser, compute)
    return evaluate_by_loss(model, batch_loss, examples, compute)
