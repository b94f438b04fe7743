"""Supervised fine-tuning: the cross-entropy of demonstrated responses.

With a teacher, distillation: the divergence of the model's distribution from a frozen model's at
each token of these responses (GKD, arXiv 2306.13649), alone or beside the cross-entropy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.data.tokenizer import Tokenizer
from fastalign.fused.cross_entropy import CrossEntropy, head_cross_entropy
from fastalign.fused.distillation import Divergence, Divisors, TeacherRows, head_distillation
from fastalign.in_memory import Objects, model_of
from fastalign.losses.chunk_losses import sft_loss_fn
from fastalign.models.forward import frozen_hidden_and_head, hidden_and_head
from fastalign.ops.head.arguments import HeadOptions
from fastalign.runs.accumulate import (
    BatchLoss,
    Examples,
    Total,
    accumulate,
    evaluate_by_loss,
    measure_examples,
    policy_loss,
)
from fastalign.runs.best import RunResult
from fastalign.runs.config import SFTConfig, SFTLoss, check_teacher, class_weight_of
from fastalign.runs.frozen import load_frozen
from fastalign.runs.inputs import Inputs, load_for_training, load_sets
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import OpenRun, open_run, with_objects

PLAIN = CrossEntropy()


@dataclass(frozen=True)
class Teacher:
    """A frozen model that another learns from.

    Attributes:
        model: the model.
        divergence: divergence from it, and that divergence's share of the loss.
        fingerprint: hash of its configuration and weights.
    """

    model: Any
    divergence: Divergence
    fingerprint: str = ""


def train_sft(
    config: SFTConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    teacher: Any = None,
) -> RunResult:
    """Run supervised fine-tuning until its last step, or until it is stopped.

    Args:
        config: the settings; None: the defaults. Model, data and folder may be left out of it.
        model: model of transformers, which stays as it is, a folder or a hub name; or the result
            of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: demonstrations: a `datasets.Dataset`, an iterable of rows (dictionaries), a
            file, a folder or a hub name. Columns are `text`, `messages`, or `prompt` and
            `completion`.
        eval_data: held-out demonstrations, or None.
        teacher: a frozen model to learn from, given as the model is, with the same tokens; the
            loss is then `config.loss.jsd`'s. None: there is none.

    Returns:
        The trained model with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or the model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with sft_run(
        config,
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        teacher=teacher,
    ) as run:
        for step in run.steps():
            total = run.gradient(step.indices)
            step.finish(run.optimise(total))
            if step.evaluates:
                step.log(run.evaluate())
        return run.end()


@contextmanager
def sft_run(
    config: SFTConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    teacher: Any = None,
) -> Iterator["SFTRun"]:
    """Open a run of supervised fine-tuning, for a loop of one's own: that of `train_sft`.

    The arguments and errors are those of `train_sft`.
    """
    objects = Objects(
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        teacher=teacher,
    )
    config = with_objects(SFTConfig, config, "sft", objects)
    check_teacher(config)
    with open_run(config, "sft") as run:
        trained, its_tokenizer = load_for_training(config, run.compute)
        terms = terms_of(config.loss, its_tokenizer, trained)
        its_teacher = load_teacher(config, trained, its_tokenizer, run.compute)
        data, held_out = load_sets(config, trained, its_tokenizer)
        examples = measure_examples(data.groups, run.compute.packing)
        eval_examples = None
        if held_out is not None:
            eval_examples = measure_examples(held_out.groups, run.compute.packing)

        def try_evaluation() -> Metrics:
            assert eval_examples is not None
            return evaluate_sft(trained, eval_examples.first(), run.compute, terms, its_teacher)

        run.begin(
            trained,
            data,
            inputs=Inputs(
                its_tokenizer,
                held_out,
                others={"teacher": {"weights": its_teacher and its_teacher.fingerprint}},
            ),
            try_evaluation=try_evaluation,
        )
        opened = SFTRun(run, trained, its_tokenizer)
        opened.terms, opened.teacher = terms, its_teacher
        opened.examples, opened.eval_examples = examples, eval_examples
        yield opened
        opened.end()


class SFTRun(OpenRun):
    """A run of supervised fine-tuning that has begun.

    Attributes:
        terms: terms of the cross-entropy beside the log-prob.
        teacher: the teacher with its share of the loss, or None.
        examples: training demonstrations, as token ids.
        eval_examples: held-out demonstrations, or None.
    """

    terms: CrossEntropy
    teacher: Teacher | None
    examples: Examples
    eval_examples: Examples | None

    def gradient(self, indices: Sequence[int]) -> Total:
        """Add the gradient of these demonstrations to the model's; return the sums."""
        return sft_gradient(
            self.model, self.examples, indices, self.compute, self.terms, self.teacher
        )

    def evaluate(self) -> Metrics:
        """Return metrics named `eval_...` of the held-out demonstrations; none without any."""
        if self.eval_examples is None:
            return {}
        return evaluate_sft(self.model, self.eval_examples, self.compute, self.terms, self.teacher)


def load_teacher(
    config: SFTConfig, model: Any, tokenizer: Tokenizer, compute: Compute
) -> Teacher | None:
    """Load the teacher of the settings, if there is one, for a model and its tokenizer.

    Raises:
        ValueError: if its vocabulary is not the model's, or a library is missing.
    """
    path, jsd = config.teacher.path, config.loss.jsd
    if path is None:
        return None
    found = load_frozen(
        "teacher", path, config.model, tokenizer, compute, offload=config.teacher.offload
    )
    own, theirs = (len(each.get_output_embeddings().weight) for each in (model, found.model))
    if own != theirs:
        if model_of(path) is not None:  # it has no tokenizer of its own to be compared
            raise ValueError(
                f"teacher: expected a vocabulary of {own} rows as the model's, got {theirs}; of a "
                "model with other rows give the folder, whose tokenizer is compared"
            )
        print(
            f"the teacher's head has {theirs} rows, the model's {own}: the divergence is over the "
            f"first {min(own, theirs)}, since the others are no tokens"
        )
    divergence = Divergence(jsd.weight, jsd.beta, jsd.temperature)
    return Teacher(found.model, divergence, found.fingerprint)


def terms_of(loss: SFTLoss, tokenizer: Tokenizer, model: Any) -> CrossEntropy:
    """Return the terms of the settings, with a weight for each token id of the model's head.

    Raises:
        ValueError: if the tokenizer has no such token, or one is named twice.
    """
    if not loss.class_weights:
        return CrossEntropy(loss.label_smoothing, loss.z_coefficient)
    head = model.get_output_embeddings().weight
    weights: dict[int, float] = {}
    for text in loss.class_weights:
        token, weight = class_weight_of(text)
        number = token_id(tokenizer, token)
        if number in weights:
            raise ValueError(f"loss.class_weights: expected each token once, got {token!r} again")
        weights[number] = weight
    class_weight = torch.ones(len(head), device=head.device)
    class_weight[list(weights)] = class_weight.new_tensor(list(weights.values()))
    return CrossEntropy(loss.label_smoothing, loss.z_coefficient, class_weight)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token, by its entry in the vocabulary or by a text that is one token.

    Raises:
        ValueError: if it is neither.
    """
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = "it does not know" if len(ids) == 1 else f"is {len(ids)} tokens"
        raise ValueError(
            f"loss.class_weights: expected a token of the tokenizer, got {token!r}, which {what}"
        )
    return int(ids[0])


def num_targets(examples: Examples, indices: Sequence[int]) -> int:
    """Return the number of trained tokens of these examples."""
    return sum(
        len(examples.groups[i].target_positions(number))
        for i in indices
        for number in range(len(examples.groups[i].response_ids))
    )


def divisor_of(examples: Examples, indices: Sequence[int], terms: CrossEntropy) -> float:
    """Return what the loss of these examples is divided by: the sum of their tokens' weights."""
    if terms.class_weight is None:
        return num_targets(examples, indices)
    ids = [
        group.response_ids[number][place]
        for group in (examples.groups[i] for i in indices)
        for number in range(len(group.response_ids))
        for place in group.target_positions(number)
    ]
    return terms.class_weight.cpu()[ids].double().sum().item()


def sft_gradient(
    model: Any,
    examples: Examples,
    indices: Sequence[int],
    compute: Compute,
    terms: CrossEntropy = PLAIN,
    teacher: Teacher | None = None,
) -> Total:
    """Add the gradient of one step's examples to the model's; return the sums."""
    batch_loss = loss_of(model, examples, indices, compute, terms, teacher)
    return accumulate(model, batch_loss, examples, indices, compute)


def loss_of(
    model: Any,
    examples: Examples,
    indices: Sequence[int],
    compute: Compute,
    terms: CrossEntropy,
    teacher: Teacher | None,
) -> BatchLoss:
    """Return the loss of micro-batches of these examples, over all of them."""
    divisor = divisor_of(examples, indices, terms)
    if teacher is None:
        return partial(sft_batch_loss, model, divisor, compute, terms=terms)
    divisors = Divisors(num_targets(examples, indices), divisor)
    return partial(distillation_batch_loss, model, teacher, divisors, compute, terms)


def sft_batch_loss(
    model: Any,
    normaliser: float,
    compute: Compute,
    batch: PackedBatch,
    chosen: list[int],
    *,
    terms: CrossEntropy = PLAIN,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's cross-entropy over `normaliser`, and the sums for its metrics."""
    if not terms.is_plain:
        hidden, head = hidden_and_head(model, batch, compute)
        options = head_options(compute)
        return head_cross_entropy(hidden, head, batch.targets, options, terms, normaliser)
    found = policy_loss(model, batch, sft_loss_fn(normaliser=normaliser), compute)
    return found.loss, found.sums


def distillation_batch_loss(
    model: Any,
    teacher: Teacher,
    divisors: Divisors,
    compute: Compute,
    terms: CrossEntropy,
    batch: PackedBatch,
    chosen: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's loss with a teacher, and the sums for its metrics."""
    # The teacher first: its activations are gone before the model's are kept.
    rows = TeacherRows(*frozen_hidden_and_head(teacher.model, batch, compute))
    return head_distillation(
        *hidden_and_head(model, batch, compute),
        rows,
        batch.targets,
        head_options(compute),
        terms,
        teacher.divergence,
        divisors,
    )


def head_options(compute: Compute) -> HeadOptions:
    """Return the options of the head's products."""
    return HeadOptions(1.0, -100, compute.product_dtype, compute.max_buffer_bytes, "auto")


def evaluate_sft(
    model: Any,
    examples: Examples,
    compute: Compute,
    terms: CrossEntropy = PLAIN,
    teacher: Teacher | None = None,
) -> Metrics:
    """Return metrics named `eval_...` of all the examples."""
    batch_loss = loss_of(model, examples, range(len(examples.groups)), compute, terms, teacher)
    return evaluate_by_loss(model, batch_loss, examples, compute)
