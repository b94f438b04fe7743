"""Settings of PPO, GRPO and RLOO: `--ppo.*`, `--kl.*`, `--value.*`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastalign.rollouts.engines.options import check_sampler
from fastalign.rollouts.sampler import SamplingParams
from fastalign.runs.config import OptimConfig, above_zero, changed_setting, require, within
from fastalign.trainers.ppo.advantages import (
    AdvantageEstimator,
    Clip,
    DrGrpo,
    Gae,
    Grpo,
    Importance,
    LossMean,
    PolicyObjective,
    Rloo,
    TokenMean,
    Unweighted,
)
from fastalign.trainers.sampling.config import FrozenReferenceConfig, SampledTrainingConfig


@dataclass(frozen=True)
class PPOSettings:
    """Advantages and policy updates on the rollouts of a step."""

    advantage: AdvantageEstimator = field(default_factory=Gae)
    """Estimate of advantages; gae needs a value model, the others several samples a prompt."""
    loss: PolicyObjective = field(default_factory=Clip)
    """The policy loss."""
    mean: LossMean = field(default_factory=TokenMean)
    """The mean of the tokens' losses."""
    importance: Importance = field(default_factory=Unweighted)
    """Weights of tokens by trainer over sampler probability."""
    epochs: int = 4
    """Number of passes over a step's rollouts."""
    mini_batches: int = 1
    """Number of optimiser steps per pass, each with an equal share of the prompts."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in the loss."""
    ptx_data: str | None = None
    """Demonstrations that each update also trains on (PTX): a file, folder or hub name."""
    ptx_coefficient: float = 1.0
    """Weight of the demonstrations' mean cross-entropy per token."""
    one_base: bool = False
    """Load one frozen base for all models: policy, value model and reward models are adapters on
    it (model.lora, and reward.sources that `fastalign reward --model.lora.rank` wrote)."""

    def __post_init__(self) -> None:
        for name, kind, examples in (
            ("advantage", AdvantageEstimator, "Gae(), Rloo() or Grpo()"),
            ("loss", PolicyObjective, "Clip(), Gspo() or Cispo()"),
            ("mean", LossMean, "TokenMean(), SequenceMean() or ConstantMean()"),
            ("importance", Importance, "Unweighted(), Truncated() or Masked()"),
        ):
            value = getattr(self, name)
            require(isinstance(value, kind), f"ppo.{name}", examples, value)
        for name in ("epochs", "mini_batches"):
            within(f"ppo.{name}", getattr(self, name), 1)
        within("ppo.entropy_coefficient", self.entropy_coefficient, 0)
        above_zero("ppo.ptx_coefficient", self.ptx_coefficient)
        if self.ptx_data is None and self.ptx_coefficient != 1.0:
            raise ValueError(
                f"ppo.ptx_coefficient: {self.ptx_coefficient} is a setting of ppo.ptx_data; got no "
                "data"
            )


@dataclass(frozen=True)
class KLPenalty:
    """The KL that holds the policy near the reference; a subclass says where it enters."""

    coefficient: float = 0.05
    """Weight of the KL penalty; its initial value if kl.target adapts it."""
    estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """Estimator of a token's KL from its log-ratio x: x (k1), x^2 / 2 (k2), exp(-x) - 1 + x (k3),
    or the exact KL over the vocabulary (full); only k1 and full have the KL's gradient here."""
    target: float | None = None
    """Adapt the coefficient so that the mean KL of a response approaches this many nats."""
    horizon: int = 10000
    """Number of responses over which the coefficient changes by the whole (clipped) error."""

    name: ClassVar[str]  # on the command line
    in_reward: ClassVar[bool]

    def __post_init__(self) -> None:
        within("kl.coefficient", self.coefficient, 0)
        above_zero("kl.target", self.target)
        within("kl.horizon", self.horizon, 1)
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.coefficient: expected more than 0 where kl.target adapts it, got 0"
            )
        if self.target is None and self.horizon != 10000:
            raise ValueError(f"kl.horizon: {self.horizon} is a setting of kl.target; got no target")


@dataclass(frozen=True)
class KLInReward(KLPenalty):
    """The KL is subtracted from each token's reward.

    There k1 and full have the gradient of the KL; k2 and k3 have a biased one.
    """

    name = "reward"
    in_reward = True


@dataclass(frozen=True)
class KLInLoss(KLPenalty):
    """The KL is added to the loss."""

    estimator: Literal["k2", "k3", "full"] = "k3"
    """Estimator of a token's KL from its log-ratio x: x^2 / 2 (k2), exp(-x) - 1 + x (k3), or the
    exact KL over the vocabulary (full)."""
    by_ratio: bool = False
    """Multiply each token's KL by the policy's ratio to the one that sampled, with its gradient,
    which makes the KL's gradient unbiased (arXiv 2512.02556)."""

    name = "loss"
    in_reward = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in ("k2", "k3", "full"):
            raise ValueError(
                "kl.estimator: expected k2, k3 or full for a KL in the loss, got "
                f"{self.estimator}; the gradient of k1 is zero in expectation"
            )
        if self.by_ratio and self.estimator == "full":
            raise ValueError(
                "kl.by_ratio: expected k2 or k3 as kl.estimator, for the exact KL is no estimate "
                "from samples, got full"
            )


KL_PENALTIES: dict[str, type[KLPenalty]] = {kl.name: kl for kl in (KLInReward, KLInLoss)}


@dataclass(frozen=True)
class ValueConfig:
    """The value model of gae: a reward model's network, evaluated at every token."""

    path: str | None = None
    """Folder of a reward model, whole or an adapter, or of a causal model (which gets a zero head);
    by default the first of reward.sources that is a folder, otherwise model.path."""
    share_policy: bool = False
    """Read values from the policy's own hidden states by a head (zero at first), not from a model
    of its own."""
    trunk_gradient: float = 1.0
    """Share of the value loss's gradient that reaches the policy's layers under value.share_policy;
    0 trains the head alone."""
    lora_rank: int = 0
    """Rank of a new adapter that is trained in place of all of the value model's weights, with the
    other settings of model.lora; 0 trains all, or the adapter that value.path is."""
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
        within("value.trunk_gradient", self.trunk_gradient, 0, 1)
        within("value.lora_rank", self.lora_rank, 0)
        for name, usual in (("path", None), ("lora_rank", 0)):
            found = getattr(self, name)
            if self.share_policy and found != usual:
                raise ValueError(
                    f"value.{name}: {found} is a setting of a value model of its own; got "
                    "value.share_policy beside it"
                )
        if not self.share_policy and self.trunk_gradient != 1.0:
            raise ValueError(
                f"value.trunk_gradient: {self.trunk_gradient:g} is a setting of value.share_policy"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(SampledTrainingConfig):
    """Settings that PPO, GRPO and RLOO share."""

    ppo: PPOSettings = field(default_factory=PPOSettings)
    kl: KLPenalty = field(default_factory=KLInReward)
    reference: FrozenReferenceConfig = field(default_factory=FrozenReferenceConfig)

    command: ClassVar[str]

    def __post_init__(self) -> None:
        method, samples = self.ppo.advantage.name, self.sampling
        require(isinstance(self.kl, KLPenalty), "kl", "KLInReward() or KLInLoss()", self.kl)
        check_sampler(self.sampler, self.vllm, may_overlap=True)
        if self.vllm.overlap and isinstance(self.ppo.importance, Unweighted):
            raise ValueError(
                "ppo.importance: expected truncated, say, with --vllm.overlap, whose samples are "
                "one step old and have to be weighted, got none"
            )
        if (samples.top_p, samples.top_k) != (1.0, 0) or samples.temperature == 0:
            raise ValueError(
                "sampling: expected samples of the policy itself: top_p 1, top_k 0 and a "
                f"temperature above 0, got {samples.top_p}, {samples.top_k} and "
                f"{samples.temperature}"
            )
        if method == "grpo" and self.kl.in_reward and self.kl.estimator == "full":
            raise ValueError(
                "kl: expected loss for the exact KL under --ppo.advantage grpo, which scales "
                "each prompt's rewards by itself, got reward"
            )
        enough = self.ppo.advantage.needs_value or samples.num_samples >= 2
        expected = f"at least 2 under --ppo.advantage {method}"
        require(enough, "sampling.num_samples", expected, samples.num_samples)
        parts, size = self.ppo.mini_batches, self.train.batch_size
        expected = f"at most train.batch_size ({size} prompts)"
        require(parts <= size, "ppo.mini_batches", expected, parts)
        if self.ppo.one_base:
            self._check_one_base()

    def _check_one_base(self) -> None:
        require(self.model.lora.rank > 0, "model.lora.rank", "more than 0 with ppo.one_base", 0)
        path = self.reference.path
        expected = "none with ppo.one_base, whose reference is the base"
        require(path is None, "reference.path", expected, path)
        strategy = self.parallel.strategy
        expected = "ddp with ppo.one_base, whose models share layers that FSDP2 would gather by one"
        require(strategy != "fsdp", "parallel.strategy", expected, strategy)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """PPO, RLOO or GRPO from a reward.

    A step samples train.batch_size prompts and updates the policy on them. The exit code is 0, 130
    after SIGINT, or 3 if --watch.stop ended the run; the run is saved in each case.
    """

    value: ValueConfig = field(default_factory=ValueConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-6, eps=1e-5))

    command = "ppo"

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.ppo.advantage.name
        if not self.ppo.advantage.needs_value and (changed := changed_setting(self.value)):
            raise ValueError(
                f"value.{changed}: a setting of a value model, which --ppo.advantage {method} "
                "does without"
            )
        if self.value.lr is not None and not self.optim.lr:
            raise ValueError(f"optim.lr: expected more than 0 where value.lr is {self.value.lr}")


@dataclass(frozen=True)
class GRPOSettings(PPOSettings):
    """Advantages and policy updates on the rollouts of a step."""

    advantage: AdvantageEstimator = field(default_factory=Grpo)
    """Estimate of advantages, with the deviation of a prompt's rewards as divisor or without."""
    epochs: int = 1
    """Number of passes over a step's rollouts."""


@dataclass(frozen=True)
class RLOOSettings(PPOSettings):
    """Advantages and policy updates on the rollouts of a step."""

    advantage: AdvantageEstimator = field(default_factory=Rloo)
    """Estimate of advantages."""
    epochs: int = 1
    """Number of passes over a step's rollouts."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyGradientConfig):
    """GRPO: PPO with advantages from each prompt's samples, and no value model.

    A step samples train.batch_size prompts and updates the policy on them. The exit code is 0, 130
    after SIGINT, or 3 if --watch.stop ended the run; the run is saved in each case.
    """

    ppo: PPOSettings = field(default_factory=GRPOSettings)
    kl: KLPenalty = field(default_factory=lambda: KLInLoss(coefficient=0.0))
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_new_tokens=512, num_samples=8)
    )

    command = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_value(self)


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(PolicyGradientConfig):
    """RLOO: REINFORCE with the mean reward of a prompt's other samples as the baseline.

    A step samples train.batch_size prompts and updates the policy on them. The exit code is 0, 130
    after SIGINT, or 3 if --watch.stop ended the run; the run is saved in each case.
    """

    ppo: PPOSettings = field(default_factory=RLOOSettings)
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_new_tokens=512, num_samples=4)
    )

    command = "rloo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_value(self)


def check_no_value(config: GRPOConfig | RLOOConfig) -> None:
    """Raise ValueError for an advantage that needs a value model."""
    needs_value = config.ppo.advantage.needs_value
    require(not needs_value, "ppo.advantage", "one without a value model", config.ppo.advantage)


GRPO_ADVANTAGES: dict[str, type[AdvantageEstimator]] = {
    estimator.name: estimator for estimator in (Grpo, DrGrpo)
}
RLOO_ADVANTAGES: dict[str, type[AdvantageEstimator]] = {Rloo.name: Rloo}
GRPO_KL_PENALTIES: dict[str, type[KLPenalty]] = {kl.name: kl for kl in (KLInLoss, KLInReward)}
