"""The score of completions: a weighted sum of reward sources, scaled, less a penalty."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor

from fastalign.compute import Compute
from fastalign.data import Content
from fastalign.evaluation import ModelReward, apply_reward, load_reward
from fastalign.evaluation.rewards import RewardFunction
from fastalign.ranks.world import ALONE, World
from fastalign.runs.metrics import Metrics
from fastalign.trainers.sampling.config import RewardSourceConfig


@dataclass(frozen=True)
class RewardSources:
    """Loaded sources; the three are parallel.

    Attributes:
        names: distinct names of the sources in the metrics.
        functions: (prompts, completions) -> numbers.
        weights: weight of each source in the sum.
        world: the ranks, all of which ask for the same scores.
    """

    names: tuple[str, ...]
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    world: World = ALONE

    def score(self, prompts: Sequence[Content], texts: Sequence[str]) -> tuple[Tensor, Metrics]:
        """Return the weighted sum of rewards of each completion, (R,) float64, and metrics.

        Raises:
            ValueError: if a source returns another number of rewards, or one that is not finite.
        """
        total = torch.zeros(len(texts), dtype=torch.float64)
        metrics: Metrics = {}
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            work = partial(apply_reward, function, prompts, texts)
            try:
                # A model's work is shared by all ranks; any other function is rank 0's alone.
                shared = isinstance(function, ModelReward)
                rewards = work() if shared else self.world.first_does(work)
            except ValueError as error:
                raise ValueError(f"reward.sources: {name}: {error}") from error
            total += weight * torch.tensor(rewards, dtype=torch.float64)
            metrics[f"rewards/{name}/mean"] = fmean(rewards)
        metrics["reward"] = total.mean().item()
        metrics["reward_std"] = total.std(correction=0).item()
        return total, metrics


def load_sources(config: RewardSourceConfig, compute: Compute) -> RewardSources:
    """Load every source; reward models go to the run's device, sharded as its other models.

    Raises:
        ValueError: if a source cannot be loaded.
        FileNotFoundError: if a file does not exist.
    """
    return RewardSources(
        names=source_names(config.sources),
        functions=tuple(load_reward(source, compute) for source in config.sources),
        weights=config.weights or (1.0,) * len(config.sources),
        world=compute.world,
    )


def source_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Return short, distinct names: a path's last part (`rm` of `.../rm/model`), then a number."""
    short = []
    for source in sources:
        path = Path(source.rstrip("/"))
        named = path.parent if path.name == "model" and path.parent.name else path
        short.append(named.stem if named.suffix == ".json" else named.name)
    count = Counter(short)
    return tuple(
        f"{name}-{number}" if count[name] > 1 else name for number, name in enumerate(short, 1)
    )


@dataclass(frozen=True)
class ScoreScale:
    """The scale that brings scores to mean 0 and standard deviation 1."""

    mean: float
    std: float

    def apply(self, rewards: Tensor) -> Tensor:
        """Return scaled rewards, (R,) to (R,)."""
        return (rewards - self.mean) / self.std


def measure_scale(rewards: Sequence[float]) -> ScoreScale:
    """Measure the scale of the starting policy's rewards.

    Raises:
        ValueError: if all rewards are the same.
    """
    scale = ScoreScale(fmean(rewards), pstdev(rewards))
    if not scale.std > 0:
        raise ValueError(
            f"reward.normalise: the {len(rewards)} completions that scores are measured on all "
            f"have the reward {scale.mean:g}; there is nothing to scale by"
        )
    return scale


def final_scores(
    config: RewardSourceConfig, rewards: Tensor, ended: Tensor, scale: ScoreScale | None
) -> Tensor:
    """Return the scores to train on: rewards (R,), scaled, less a penalty where not `ended`.

    Returns:
        (R,) float32.
    """
    scores = rewards if scale is None else scale.apply(rewards)
    return (scores - config.missing_eos_penalty * (~ended).to(scores.dtype)).float()
