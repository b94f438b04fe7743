"""Reward models: from comparisons to a score of responses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.batch.packed import PackedBatch
from fastalign.batch.stored import stored
from fastalign.compute import Compute
from fastalign.data.load import TokenizedDataset
from fastalign.data.readers.row import DataFault
from fastalign.data.tokenizer import Tokenizer, eos_token_ids, use_distinct_pad
from fastalign.evaluation.judged_pairs import pair_measures
from fastalign.in_memory import Objects
from fastalign.models.load import save_reward_model
from fastalign.models.reward import response_reward, set_pad_token
from fastalign.ranks.whole_weights import whole
from fastalign.runs.accumulate import (
    Examples,
    Total,
    accumulate,
    evaluate_by_loss,
    measure_examples,
)
from fastalign.runs.best import RunResult
from fastalign.runs.final_model import written
from fastalign.runs.inputs import (
    Inputs,
    check_positions,
    load_data,
    load_reward_for_training,
    load_sets,
    share,
)
from fastalign.runs.metrics import Metrics
from fastalign.runs.open import OpenRun, open_run, with_objects
from fastalign.trainers.reward.config import Labels, RewardConfig, RewardLoss, TieLoss
from fastalign.trainers.reward.evaluation import (
    baseline_measures,
    judge_pairs,
    measure_scale,
    pair_rows,
    tie_rate,
    write_evaluation,
)

# Name of the learned tie parameter on the model; the saved model's config holds its nu.
LOG_NU = "log_nu"


@dataclass(frozen=True)
class Comparisons:
    """Pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        labels: people's verdicts on them.
    """

    examples: Examples
    labels: Labels


def train_reward(
    config: RewardConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
) -> RunResult:
    """Train a reward model to the run's last step, or until it is stopped.

    Args:
        config: the settings; None: the defaults. Model, data and folder may be left out of it.
        model: a causal model, which gets a head, or a reward model: a model of transformers, which
            stays as it is, a folder or a hub name; or the result of a run.
        tokenizer: tokenizer of transformers, or a folder or hub name; None: that of the model's
            `name_or_path`.
        train_data: comparisons: a `datasets.Dataset`, an iterable of rows (dictionaries), a file, a
            folder or a hub name. Columns are `chosen` and `rejected`, with or without `prompt`; or
            `response_a`, `response_b` and `label` (`a`, `b` or `tie`).
        eval_data: held-out comparisons, or None.

    Returns:
        The trained reward model with its tokenizer, its metrics, and the run's folder.

    Raises:
        ValueError: if a setting, a row or the model is at fault; the message is one line.
        FileNotFoundError: if a file is not there.
    """
    with reward_run(
        config, model=model, tokenizer=tokenizer, train_data=train_data, eval_data=eval_data
    ) as run:
        for step in run.steps():
            nu = run.learned_nu()
            total = run.gradient(step.indices)
            step.finish(run.optimise(total) | ({} if nu is None else {"nu": nu}))
            if step.evaluates:
                step.log(run.evaluate())
        return run.end()


@contextmanager
def reward_run(
    config: RewardConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
) -> Iterator["RewardRun"]:
    """Open a run that trains a reward model, for a loop of one's own: that of `train_reward`.

    The arguments and errors are those of `train_reward`.
    """
    objects = Objects(model=model, tokenizer=tokenizer, train_data=train_data, eval_data=eval_data)
    config = with_objects(RewardConfig, config, "reward", objects)
    others = ["eval"] if config.data.eval is not None and config.run.export is None else []
    with open_run(config, "reward", others) as run:
        trained, own = load_reward_for_training(config, run.compute)
        data, held_out = load_sets(config, trained, own)
        judged = None if held_out is None else pairs_to_judge(config, held_out, trained, own)
        pairs = prepare_comparisons(config.loss, data, run.compute)
        share_reward_model(trained, config, data, own, run.compute)
        eval_pairs = None
        if held_out is not None:
            eval_pairs = prepare_comparisons(config.loss, held_out, run.compute)

        def try_evaluation() -> Metrics:
            assert eval_pairs is not None
            first = Comparisons(eval_pairs.examples.first(), eval_pairs.labels)
            return evaluate_comparisons(trained, config.loss, first, run.compute)

        run.begin(trained, data, inputs=Inputs(own, held_out), try_evaluation=try_evaluation)
        opened = RewardRun(run, trained, own)
        opened.config, opened.pairs, opened.eval_pairs = config, pairs, eval_pairs
        opened.sets = data, judged
        yield opened
        opened.end()


class RewardRun(OpenRun):
    """A run that trains a reward model and has begun.

    Attributes:
        config: settings of the run.
        pairs: training comparisons, as token ids.
        eval_pairs: held-out comparisons, or None.
        sets: training data, and the held-out pairs that a finished model is judged on.
    """

    config: RewardConfig
    pairs: Comparisons
    eval_pairs: Comparisons | None
    sets: tuple[TokenizedDataset, TokenizedDataset | None]

    def gradient(self, indices: Sequence[int]) -> Total:
        """Add the gradient of these comparisons to the model's; return the sums."""
        return reward_gradient(self.model, self.config.loss, self.pairs, indices, self.compute)

    def learned_nu(self) -> float | None:
        """Return the present frequency of ties, or None if it is not learned."""
        nu = learned_nu(self.model, self.config.loss)
        return None if nu is None else float(nu.item())

    def evaluate(self) -> Metrics:
        """Return metrics named `eval_...` of the held-out comparisons; none without any."""
        if self.eval_pairs is None:
            return {}
        return evaluate_comparisons(self.model, self.config.loss, self.eval_pairs, self.compute)

    def _finish(self) -> RunResult:
        model, tokenizer, config = self.model, self.tokenizer, self.config
        data, judged = self.sets
        save_model = partial(save_reward_model, leave_out=(LOG_NU,))
        # The scores' scale is that of the trained model.
        scale = partial(complete_reward, model, config, data, self.compute)
        result = self._run.end(model, tokenizer, save_model=save_model, before_saving=scale)
        if result.finished and judged is not None:
            judge(model, config, (data, judged), tokenizer, self.compute)
        if hasattr(model, LOG_NU):  # no parameter of the architecture; its nu is in the config
            delattr(model, LOG_NU)
        return result


def pairs_to_judge(
    config: RewardConfig, held_out: TokenizedDataset, model: Any, tokenizer: Tokenizer
) -> TokenizedDataset:
    """Return the held-out pairs that a finished model is judged on, dropped ties among them.

    Raises:
        ValueError: if all are ties, so that no prediction can be right or wrong.
    """
    if all(held_out.ties):
        raise ValueError(
            f"data.eval: expected at least one pair that is no tie, got {len(held_out.ties)} ties"
        )
    if not held_out.report.num_ties_dropped:
        return held_out
    assert config.data.eval is not None
    data = load_data(config, config.data.eval, tokenizer, keep_ties=True)
    check_positions(model, data)
    return data


def prepare_comparisons(loss: RewardLoss, data: TokenizedDataset, compute: Compute) -> Comparisons:
    """Measure the pairs; print how many rows have margins or votes that the loss does not use."""
    num_margins = sum(margin is not None for margin in data.margins)
    if num_margins and not loss.uses_margins:
        print(f"margins of {num_margins} rows are not used by this loss")
    num_votes = sum(votes is not None for votes in data.votes)
    if num_votes and not loss.votes:
        print(f"votes of {num_votes} rows are not used; --loss.votes trains on them")
    labels = Labels(
        torch.tensor(data.ties),
        torch.tensor([margin or 0.0 for margin in data.margins]),
        vote_shares(data) if loss.votes else None,
    )
    return Comparisons(measure_examples(data.groups, compute.packing), labels)


def vote_shares(data: TokenizedDataset) -> Tensor:
    """Return shares (number of pairs, 3) of the votes for the first response, the second, a tie.

    Raises:
        DataFault: if a row has no votes; it names the first.
    """
    shares = []
    for votes, source in zip(data.votes, data.sources, strict=True):
        if votes is None:
            raise DataFault(
                source,
                "--loss.votes: expected an object of counts {a, b, tie} in a row with response_a "
                "and response_b (of chosen and rejected nobody can say which was a), got none",
                "votes",
            )
        shares.append(votes.shares())
    return torch.tensor(shares)


def share_reward_model(
    model: Any,
    config: RewardConfig,
    data: TokenizedDataset,
    tokenizer: Tokenizer,
    compute: Compute,
) -> None:
    """Give the model a pad token that ends no response, and nu if it is learned; share it."""
    ends = stored(data.groups).last_ids()
    stops = eos_token_ids(tokenizer, config.model.path)
    set_pad_token(model, use_distinct_pad(tokenizer, ends.union(stops)))
    add_nu(model, config)
    share(model, compute)


def add_nu(model: Any, config: RewardConfig) -> None:
    """Register the parameter that the loss learns, if it does, so that checkpoints hold it."""
    loss = config.loss
    if not isinstance(loss, TieLoss) or not loss.nu_lr:
        return
    if not config.optim.lr:
        raise ValueError(f"optim.lr: expected more than 0 where loss.nu_lr is {loss.nu_lr}, got 0")
    # One element in a row: FSDP2 shards no scalars.
    parameter = nn.Parameter(torch.tensor([loss.log_nu], device=model.device))
    parameter.lr_scale = loss.nu_lr / config.optim.lr  # type: ignore[attr-defined]
    model.register_parameter(LOG_NU, parameter)


def learned_nu(model: Any, loss: RewardLoss) -> Tensor | None:
    """Return the present nu (), or None if it is not learned."""
    log_nu = getattr(model, LOG_NU, None)
    if log_nu is None or not isinstance(loss, TieLoss):
        return None
    return loss.nu_of(whole(log_nu).view(()))


def complete_reward(
    model: Any, config: RewardConfig, data: TokenizedDataset, compute: Compute
) -> None:
    """Give the configuration the scale of the scores and, under a loss with ties, `tie_nu`."""
    measure_scale(model, data, compute, config.run.seed)
    nu = learned_nu(model, config.loss)
    if isinstance(config.loss, TieLoss):
        model.config.tie_model = config.loss.name
        model.config.tie_nu = config.loss.nu if nu is None else nu.item()


def judge(
    model: Any,
    config: RewardConfig,
    sets: tuple[TokenizedDataset, TokenizedDataset],
    tokenizer: Tokenizer,
    compute: Compute,
) -> None:
    """Write the trained model's measures on held-out pairs into the run's `eval/`; print the main.

    `sets` are the training pairs and the held-out pairs.
    """
    train, held_out = sets
    nu = learned_nu(model, config.loss)
    nu = None if nu is None else nu.detach().cpu()
    rate = None if config.loss.has_ties else tie_rate(train, needed=any(held_out.ties))
    pairs = judge_pairs(model, config.loss, nu, rate, held_out, compute)
    measures = pair_measures(pairs) | baseline_measures(train, held_out, tokenizer)
    if rate is not None:
        measures["tie_rate"] = rate
    folder = Path(config.run.dir) / "eval"
    rows = pair_rows(pairs, held_out.sources)
    with written(config, folder, compute.world) as aside:
        compute.world.first_does(lambda: write_evaluation(aside, measures, rows))
    for name in ("accuracy", "longer_wins_accuracy", "bag_of_words_accuracy", "log_likelihood"):
        if name in measures:
            print(f"{name} {measures[name]:.3f} +- {measures[f'{name}_se']:.3f}")


def reward_gradient(
    model: Any, loss: RewardLoss, pairs: Comparisons, indices: Sequence[int], compute: Compute
) -> Total:
    """Add the gradient of one step's pairs to the model's; return the sums."""
    batch_loss = partial(reward_batch_loss, model, loss, pairs, len(indices), compute)
    return accumulate(model, batch_loss, pairs.examples, indices, compute)


def reward_batch_loss(
    model: Any,
    loss: RewardLoss,
    pairs: Comparisons,
    normaliser: int,
    compute: Compute,
    batch: PackedBatch,
    chosen: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's loss over `normaliser` pairs, and the sums for its metrics."""
    reward = response_reward(model, batch, compute)
    labels = pairs.labels.at(chosen, reward.device)
    each = loss.pair_losses(reward.view(-1, 2), labels, learned_nu(model, loss))
    return each.sum() / normaliser, reward_sums(reward.detach(), labels.tie)


def evaluate_comparisons(
    model: Any, loss: RewardLoss, pairs: Comparisons, compute: Compute
) -> Metrics:
    """Return metrics named `eval_...` of all the pairs."""
    normaliser = len(pairs.examples.groups)
    batch_loss = partial(reward_batch_loss, model, loss, pairs, normaliser, compute)
    return evaluate_by_loss(model, batch_loss, pairs.examples, compute)


def reward_sums(reward: Tensor, tie: Tensor) -> dict[str, Tensor]:
    """Return TRL's metrics, summed over pairs; `accuracy` and `margin` leave ties out."""
    difference = (reward[0::2] - reward[1::2])[~tie]
    return {
        "accuracy": (difference > 0).sum(),
        "margin": difference.sum(),
        "min_reward": reward.min(),
        "mean_reward": reward.sum() / 2,
        "max_reward": reward.max(),
        "num_pairs": torch.tensor(tie.numel()),
        "num_ties": tie.sum(),
    }
