"""Reward models: comparisons to a score of responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.data import (
    DataFault,
    TokenizedDataset,
    Tokenizer,
    eos_token_ids,
    use_distinct_pad,
)
from fastalign.evaluation import pair_measures
from fastalign.models import response_reward, set_pad_token
from fastalign.runs.accumulate import (
    BatchLoss,
    Examples,
    accumulate,
    evaluate_by_loss,
    measure_examples,
)
from fastalign.runs.data import check_positions, load_data, load_sets
from fastalign.runs.load_models import load_reward_for_training, share
from fastalign.runs.loop import run_loop
from fastalign.runs.metrics import Metrics, mean_metrics
from fastalign.runs.open import opened_run
from fastalign.runs.step import supervised
from fastalign.runs.task import RunResult, Task
from fastalign.trainers.reward.config import RewardConfig
from fastalign.trainers.reward.evaluation import (
    baseline_measures,
    judge_pairs,
    measure_scale,
    pair_rows,
    tie_rate,
    write_evaluation,
)
from fastalign.trainers.reward.losses import Labels, RewardLoss
from fastalign.trainers.reward.tie_parameter import add_nu, learned_nu, save_with_nu


@dataclass(frozen=True)
class Comparisons:
    """Pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        labels: what people said of them.
    """

    examples: Examples
    labels: Labels


def train_reward(config: RewardConfig) -> RunResult:
    """Trains a reward model to the run's end, or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    with opened_run(config) as compute:
        model, tokenizer = load_reward_for_training(config, compute)
        data, held_out = load_sets(config, model, tokenizer)
        judged = held_out and to_judge(config, held_out, model, tokenizer)
        pairs = prepare(config.loss, data, compute)
        ends = {ids[-1] for group in data.groups for ids in group.response_ids}
        stops = eos_token_ids(tokenizer, config.model.path)
        set_pad_token(model, use_distinct_pad(tokenizer, ends.union(stops)))
        add_nu(model, config)
        share(model, compute)
        evaluate = None
        if held_out is not None:
            evaluate = make_evaluate(model, config, held_out, compute)

        def save_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
            measure_scale(model, data, compute, config.run.seed)
            save_with_nu(model, tokenizer, folder, loss=config.loss)

        result = run_loop(
            config,
            model,
            Task(
                title="reward",
                num_examples=len(data.groups),
                data_fingerprint=data.fingerprint,
                tokenizer=tokenizer,
                world=compute.world,
                take_step=supervised(
                    lambda indices: reward_step(model, config.loss, pairs, indices, compute),
                    config.optim,
                ),
                evaluate=evaluate,
                save_model=save_model,
            ),
        )
        if result.finished and judged is not None:
            judge(model, config, data, judged, tokenizer, compute)
        return result


def to_judge(
    config: RewardConfig, held_out: TokenizedDataset, model: Any, tokenizer: Tokenizer
) -> TokenizedDataset:
    """The held-out pairs that a finished model is judged on: ties, too, if any were dropped.

    Raises:
        ValueError: all are ties, so that nothing can be right or wrong.
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


def prepare(loss: RewardLoss, data: TokenizedDataset, compute: Compute) -> Comparisons:
    """Measures the pairs; says where rows have what the loss has no place for.

    Raises:
        DataFault: a row without the votes that the loss is to use.
    """
    num_margins = sum(margin is not None for margin in data.margins)
    if num_margins and not loss.uses_margins:
        print(f"margins of {num_margins} rows are not used by this loss", flush=True)
    num_votes = sum(votes is not None for votes in data.votes)
    if num_votes and not loss.votes:
        print(f"votes of {num_votes} rows are not used; --loss.votes trains on them", flush=True)
    labels = Labels(
        torch.tensor(data.ties),
        torch.tensor([margin or 0.0 for margin in data.margins]),
        vote_shares(data) if loss.votes else None,
    )
    return Comparisons(measure_examples(data.groups, compute.packing), labels)


def vote_shares(data: TokenizedDataset) -> Tensor:
    """Shares (number of pairs, 3) of the votes for the first response, the second, and a tie.

    Raises:
        DataFault: the first row without votes.
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


def make_evaluate(
    model: Any, config: RewardConfig, data: TokenizedDataset, compute: Compute
) -> Callable[[], Metrics]:
    """The held-out pairs' metrics as a function of the model as it stands."""
    pairs = prepare(config.loss, data, compute)
    batch_loss = make_reward_loss(model, config.loss, pairs, len(data.groups), compute)
    return lambda: evaluate_by_loss(pairs.examples, batch_loss, compute)


def judge(
    model: Any,
    config: RewardConfig,
    train: TokenizedDataset,
    held_out: TokenizedDataset,
    tokenizer: Tokenizer,
    compute: Compute,
) -> None:
    """Writes what the trained model is worth into the run's `eval/`, and prints the best of it."""
    nu = learned_nu(model, config.loss)
    nu = None if nu is None else nu.detach().cpu()
    rate = None if config.loss.has_ties else tie_rate(train, needed=any(held_out.ties))
    pairs = judge_pairs(model, config.loss, nu, rate, held_out, compute)
    measures = pair_measures(pairs) | baseline_measures(train, held_out, tokenizer)
    if rate is not None:
        measures["tie_rate"] = rate
    folder = Path(config.run.dir) / "eval"
    rows = pair_rows(pairs, held_out.sources)
    compute.world.first_does(lambda: write_evaluation(folder, measures, rows))
    for name in ("accuracy", "longer_wins_accuracy", "bag_of_words_accuracy", "log_likelihood"):
        if name in measures:
            print(f"{name} {measures[name]:.3f} +- {measures[f'{name}_se']:.3f}", flush=True)
    print(f"evaluation written to {folder}", flush=True)


def make_reward_loss(
    model: Any, loss: RewardLoss, pairs: Comparisons, normaliser: int, compute: Compute
) -> BatchLoss:
    """The loss of each micro-batch; the two responses of a pair stay together."""

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        reward = response_reward(model, batch, compute)
        labels = pairs.labels.at(chosen, reward.device)
        each = loss.of_pairs(reward.view(-1, 2), labels, learned_nu(model, loss))
        return each.sum() / normaliser, reward_sums(reward.detach(), labels.tie)

    return BatchLoss(model, of_batch)


def reward_sums(reward: Tensor, tie: Tensor) -> dict[str, Tensor]:
    """TRL's metrics, summed over pairs; accuracy and margin are of those that are no ties."""
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


def reward_step(
    model: Any, loss: RewardLoss, pairs: Comparisons, indices: Sequence[int], compute: Compute
) -> tuple[Metrics, int]:
    """Adds one step's gradient; returns its metrics and the packed tokens computed."""
    batch_loss = make_reward_loss(model, loss, pairs, len(indices), compute)
    value, sums, num_tokens = accumulate(
        pairs.examples, indices, batch_loss, compute, backward=True
    )
    nu = learned_nu(model, loss)
    learned = {} if nu is None else {"nu": nu.item()}
    return {"loss": value, **mean_metrics(sums), **learned}, num_tokens
