"""The settings of PPO: `--ppo.*`, `--kl.*`, `--value.*`, `--watch.*`."""

from dataclasses import dataclass, field, fields
from typing import Literal

from fastalign.ranks.config import ParallelConfig
from fastalign.rollouts import SamplerName, SamplingParams, VllmOptions, check_sampler
from fastalign.runs.config import (
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    above_zero,
    within,
)
from fastalign.trainers.sampling.config import (
    FrozenReferenceConfig,
    PromptDataConfig,
    RewardSourceConfig,
    WatchConfig,
)

Advantage = Literal["gae", "rloo", "grpo"]
Whitening = Literal["auto", "none", "advantages", "rewards", "both"]
KLEstimator = Literal["k1", "k2", "k3", "full"]


@dataclass(frozen=True)
class PPOSettings:
    """The updates on one step's rollouts."""

    advantage: Advantage = "gae"
    """Of a value model (gae); or, without one, of each response beside the others of its prompt:
    rloo (less their mean), grpo (less the mean, over the standard deviation)."""
    epochs: int = 4
    """Passes over a step's rollouts."""
    mini_batches: int = 1
    """Optimiser steps of one pass; each has an equal share of the prompts."""
    clip_range: float = 0.2
    """How far a token's probability ratio counts from 1."""
    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Weight of longer returns in gae."""
    whiten: Whitening = "auto"
    """What is brought to standard deviation 1 over a step's tokens; auto: gae's advantages."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    max_importance_weight: float | None = None
    """Weight tokens by the trainer's over the sampler's probability, up to this; default: not."""
    ptx_data: str | None = None
    """Demonstrations that each update also learns (InstructGPT's PTX): file, folder or hub name."""
    ptx_coefficient: float = 1.0
    """Weight of their cross-entropy, a mean over tokens."""

    def __post_init__(self) -> None:
        for name in ("epochs", "mini_batches"):
            within(f"ppo.{name}", getattr(self, name), 1)
        if not 0 < self.clip_range < 1:
            raise ValueError(f"ppo.clip_range: expected a number in (0, 1), got {self.clip_range}")
        within("ppo.gamma", self.gamma, 0, 1)
        within("ppo.gae_lambda", self.gae_lambda, 0, 1)
        within("ppo.entropy_coefficient", self.entropy_coefficient, 0)
        above_zero("ppo.max_importance_weight", self.max_importance_weight)
        above_zero("ppo.ptx_coefficient", self.ptx_coefficient)
        if self.advantage != "gae" and (self.gamma, self.gae_lambda) != (1.0, 0.95):
            raise ValueError(
                "ppo.gamma, ppo.gae_lambda: settings of gae; expected their defaults under "
                f"{self.advantage}, got {self.gamma} and {self.gae_lambda}"
            )
        if self.ptx_data is None and self.ptx_coefficient != 1.0:
            raise ValueError(
                f"ppo.ptx_coefficient: {self.ptx_coefficient} is a setting of ppo.ptx_data; got no "
                "data"
            )
        if self.advantage != "gae" and self.whiten in ("rewards", "both"):
            raise ValueError(
                f"ppo.whiten: expected auto, none or advantages under {self.advantage}, which has "
                f"one reward a response, got {self.whiten}"
            )

    @property
    def whitens_advantages(self) -> bool:
        """What `whiten` says of advantages."""
        automatic = self.whiten == "auto" and self.advantage == "gae"
        return automatic or self.whiten in ("advantages", "both")

    @property
    def whitens_rewards(self) -> bool:
        """What `whiten` says of rewards; they keep their mean."""
        return self.whiten in ("rewards", "both")


@dataclass(frozen=True)
class KLConfig:
    """What holds the policy near the reference."""

    coefficient: float = 0.05
    """Weight of the KL; with a target, where it begins."""
    estimator: KLEstimator = "k1"
    """Of a token's KL: the log-ratio (k1), half its square (k2), exp(-x) - 1 + x (k3), or the exact
    KL over the vocabulary (full); in the reward, k1 and full have the KL's gradient, k2 and k3 have
    not."""
    place: Literal["reward", "loss"] = "reward"
    """Taken from each token's reward, or added to the loss (k2, k3, full)."""
    target: float | None = None
    """Adapt the coefficient so that the KL of a response comes near this many nats."""
    horizon: int = 10000
    """Responses over which the coefficient would change by the whole (clipped) error."""

    def __post_init__(self) -> None:
        within("kl.coefficient", self.coefficient, 0)
        above_zero("kl.target", self.target)
        within("kl.horizon", self.horizon, 1)
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator: expected k2, k3 or full for a KL in the loss, got k1, whose "
                "gradient is zero in expectation"
            )
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.coefficient: expected more than 0 where kl.target adapts it, got 0"
            )
        if self.target is None and self.horizon != 10000:
            raise ValueError(f"kl.horizon: {self.horizon} is a setting of kl.target; got no target")


@dataclass(frozen=True)
class ValueConfig:
    """The value model of gae: a reward model's network, read at every token."""

    path: str | None = None
    """A reward model's folder, or a causal model's (under a head of zeros); default: the first of
    reward.sources that is a folder, otherwise model.path."""
    lr: float | None = None
    """Peak learning rate; default: optim.lr."""
    coefficient: float = 0.1
    """Weight of the value loss."""
    clip_range: float = 0.2
    """How far a value may move in one step before its loss is clipped."""

    def __post_init__(self) -> None:
        above_zero("value.lr", self.lr)
        above_zero("value.coefficient", self.coefficient)
        above_zero("value.clip_range", self.clip_range)


@dataclass(frozen=True)
class PPOConfig:
    """PPO from a reward: a step is the rollouts of train.batch_size prompts and their updates.

    Exit code 0, 130 after SIGINT, or 3 where --watch.stop ended the run; either way the run is
    saved and can be resumed.
    """

    model: ModelConfig
    data: PromptDataConfig
    reward: RewardSourceConfig
    run: RunConfig
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """What draws completions: the policy in this process, vLLM in it, in a process of its own, or a
    server that `fastalign vllm-server` started."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    kl: KLConfig = field(default_factory=KLConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    reference: FrozenReferenceConfig = field(default_factory=FrozenReferenceConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-6, eps=1e-5))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        method, samples = self.ppo.advantage, self.sampling
        check_sampler(self.sampler, self.vllm, may_overlap=True)
        if self.vllm.overlap and self.ppo.max_importance_weight is None:
            raise ValueError(
                "ppo.max_importance_weight: expected a number (2, say) with --vllm.overlap, whose "
                "samples are one step old and have to be weighted, got none"
            )
        if (samples.top_p, samples.top_k) != (1.0, 0) or samples.temperature == 0:
            raise ValueError(
                "sampling: expected samples of the policy itself: top_p 1, top_k 0 and a "
                f"temperature above 0, got {samples.top_p}, {samples.top_k} and "
                f"{samples.temperature}"
            )
        if method == "grpo" and (self.kl.estimator, self.kl.place) == ("full", "reward"):
            raise ValueError(
                "kl.place: expected loss for the exact KL under --ppo.advantage grpo, which scales "
                "each prompt's rewards by itself, got reward"
            )
        if method != "gae" and samples.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples: expected at least 2 under --ppo.advantage {method}, "
                f"got {samples.num_samples}"
            )
        if method != "gae" and self.value != ValueConfig():
            changed = [
                entry.name
                for entry in fields(ValueConfig)
                if getattr(self.value, entry.name) != entry.default
            ]
            raise ValueError(
                f"value.{changed[0]}: a setting of a value model, which --ppo.advantage {method} "
                "does without"
            )
        if self.train.batch_size < self.ppo.mini_batches:
            raise ValueError(
                f"ppo.mini_batches: expected at most train.batch_size ({self.train.batch_size} "
                f"prompts), got {self.ppo.mini_batches}"
            )
        if self.value.lr is not None and not self.optim.lr:
            raise ValueError(f"optim.lr: expected more than 0 where value.lr is {self.value.lr}")
