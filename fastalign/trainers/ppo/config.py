"""Settings of PPO: `--ppo.*`, `--kl.*`, `--value.*`, `--watch.*`."""

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
    """Advantages and policy updates on the rollouts of a step."""

    advantage: Advantage = "gae"
    """Advantage estimator: gae with a value model, or without one rloo (reward minus the mean of
    the prompt's other responses) or grpo (reward standardised over the prompt's responses)."""
    epochs: int = 4
    """Number of passes over a step's rollouts."""
    mini_batches: int = 1
    """Number of optimiser steps per pass, each with an equal share of the prompts."""
    clip_range: float = 0.2
    """Clip each token's probability ratio to within this distance of 1."""
    gamma: float = 1.0
    """Discount factor of later rewards."""
    gae_lambda: float = 0.95
    """GAE's lambda, the weight of longer returns."""
    whiten: Whitening = "auto"
    """Quantities scaled to standard deviation 1 over a step's tokens; auto is gae's advantages."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in the loss."""
    max_importance_weight: float | None = None
    """Weight tokens by trainer over sampler probability, capped at this; by default unweighted."""
    ptx_data: str | None = None
    """Demonstrations that each update also trains on (PTX): a file, folder or hub name."""
    ptx_coefficient: float = 1.0
    """Weight of the demonstrations' mean cross-entropy per token."""

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
        """Whether advantages are scaled to standard deviation 1."""
        automatic = self.whiten == "auto" and self.advantage == "gae"
        return automatic or self.whiten in ("advantages", "both")

    @property
    def whitens_rewards(self) -> bool:
        """Whether rewards are scaled to standard deviation 1; they keep their mean."""
        return self.whiten in ("rewards", "both")


@dataclass(frozen=True)
class KLConfig:
    """The KL penalty that keeps the policy close to the reference."""

    coefficient: float = 0.05
    """Weight of the KL penalty; its initial value if kl.target adapts it."""
    estimator: KLEstimator = "k1"
    """Estimator of a token's KL from its log-ratio x: x (k1), x^2 / 2 (k2), exp(-x) - 1 + x (k3),
    or the exact KL over the vocabulary (full); in the reward only k1 and full have the KL's
    gradient."""
    place: Literal["reward", "loss"] = "reward"
    """Subtract the KL from each token's reward, or add it to the loss (k2, k3 and full only)."""
    target: float | None = None
    """Adapt the coefficient so that the mean KL of a response approaches this many nats."""
    horizon: int = 10000
    """Number of responses over which the coefficient changes by the whole (clipped) error."""

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
    """The value model of gae: a reward model's network, evaluated at every token."""

    path: str | None = None
    """Folder of a reward model or of a causal model (which gets a zero head); by default the first
    of reward.sources that is a folder, otherwise model.path."""
    lr: float | None = None
    """Peak learning rate of the value model; by default optim.lr."""
    coefficient: float = 0.1
    """Weight of the value loss."""
    clip_range: float = 0.2
    """Clip the value loss where a value moves further than this in one step."""

    def __post_init__(self) -> None:
        above_zero("value.lr", self.lr)
        above_zero("value.coefficient", self.coefficient)
        above_zero("value.clip_range", self.clip_range)


@dataclass(frozen=True)
class PPOConfig:
    """PPO, RLOO or GRPO from a reward.

    A step samples train.batch_size prompts and updates the policy on them. The exit code is 0, 130
    after SIGINT, or 3 if --watch.stop ended the run; the run is saved in each case.
    """

    model: ModelConfig
    data: PromptDataConfig
    reward: RewardSourceConfig
    run: RunConfig
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """Engine that draws completions: the model itself (transformers), vLLM in this process, vLLM
    in its own process, or a server started by `fastalign vllm-server`."""
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
