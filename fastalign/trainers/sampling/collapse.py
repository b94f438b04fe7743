"""Watch for a collapsed policy by limits on its samples, and for steps that teach it nothing."""

from collections.abc import Sequence

from torch import Tensor

from fastalign.runs.metrics import Metrics
from fastalign.runs.state import TrainState
from fastalign.trainers.sampling.config import WatchConfig

RUN_LENGTH = 4  # tokens of the runs that repeats are counted of
STEPS_WITHOUT_SIGNAL = "num_steps_without_signal"  # among them, too
COLLAPSED_IN_A_ROW = "collapsed_in_a_row"  # among the numbers that a checkpoint keeps


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Return whether fewer than half of at least three runs of four tokens are distinct."""
    runs = [
        tuple(token_ids[place : place + RUN_LENGTH])
        for place in range(len(token_ids) - RUN_LENGTH + 1)
    ]
    return len(runs) >= 3 and 2 * len(set(runs)) < len(runs)


def repeated_ratio(completions: Sequence[Sequence[int]]) -> float:
    """Return the share of repetitive completions."""
    return sum(is_repetitive(ids) for ids in completions) / len(completions)


def signs_of_collapse(metrics: Metrics, config: WatchConfig) -> list[str]:
    """Return one phrase for each limit that a step's samples exceed."""
    limits = (
        ("entropy", "entropy", "below", config.min_entropy),
        ("completions/mean_length", "mean length", "below", config.min_length),
        ("completions/clipped_ratio", "share without an end", "above", config.max_unfinished),
        ("completions/repeated_ratio", "share of repeated text", "above", config.max_repeated),
        ("objective/kl", "KL", "above", config.max_kl),
    )
    return [
        f"{what} {metrics[name]:.3g} {side} {limit:g}"
        for name, what, side, limit in limits
        if (metrics[name] < limit if side == "below" else metrics[name] > limit)
    ]


def watch(metrics: Metrics, config: WatchConfig, kept: dict[str, float]) -> Metrics:
    """Print when a collapse begins or ends; return `collapsed`, the number of such steps in a row.

    `kept` are the run's own numbers, of which the count is one.
    """
    signs = signs_of_collapse(metrics, config)
    before = int(kept.get(COLLAPSED_IN_A_ROW, 0))
    count = before + 1 if signs else 0
    kept[COLLAPSED_IN_A_ROW] = count
    if count == 1:
        print(f"the policy looks collapsed: {', '.join(signs)}")
    elif before and not signs:
        print("the policy no longer looks collapsed")
    return {"collapsed": count}


def reason_to_stop(metrics: Metrics, config: WatchConfig) -> str | None:
    """Return the reason to end the run, or None; only `watch.stop` lets it end."""
    if not config.stop or metrics["collapsed"] < config.patience:
        return None
    signs = ", ".join(signs_of_collapse(metrics, config))
    return f"collapsed for {int(metrics['collapsed'])} steps: {signs}"


def all_rewards_equal(rewards: Tensor, num_samples: int) -> bool:
    """Return whether rewards (R,) order no samples: those of each prompt are all equal.

    Args:
        rewards: all samples of the first prompt, then of the second.
        num_samples: samples of a prompt that are compared; 1: all R are compared with each other.
    """
    groups = rewards.view(-1, num_samples) if num_samples > 1 else rewards.view(1, -1)
    return groups.shape[1] > 1 and bool((groups == groups[:, :1]).all())


def count_without_signal(state: TrainState, reason: str | None) -> Metrics:
    """Count a step without a learning signal; print the first of the run.

    Args:
        state: state of the run, whose `kept` holds the count.
        reason: what is missing, or None if the step has a signal.

    Returns:
        `num_steps_without_signal`, the number of such steps so far.
    """
    count = int(state.kept.get(STEPS_WITHOUT_SIGNAL, 0)) + (reason is not None)
    if reason is not None and count == 1:
        print(f"step {state.step + 1}: {reason}")
    state.kept[STEPS_WITHOUT_SIGNAL] = count
    return {STEPS_WITHOUT_SIGNAL: count}


def print_steps_without_signal(state: TrainState) -> None:
    """Print the number of steps without a learning signal, if there were any."""
    count = int(state.kept.get(STEPS_WITHOUT_SIGNAL, 0))
    if count:
        print(f"{count} of {state.step} steps had no learning signal")
