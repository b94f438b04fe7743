"""The inputs of every PPO step: models, sampler, prompts, reward sources, scale of scores."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.compute import Compute
from fastalign.data.load import load_examples
from fastalign.data.tokenizer import (
    Tokenizer,
    check_same_vocabulary,
    eos_token_ids,
    load_tokenizer,
    use_distinct_pad,
)
from fastalign.evaluation.rewards import is_reward_network
from fastalign.models.architecture import is_reward_model
from fastalign.models.attention import attention_name
from fastalign.models.head import lm_head
from fastalign.models.load import read_config
from fastalign.models.lora import has_adapter
from fastalign.models.lora_files import adapter_base
from fastalign.models.reward import RewardScale, set_pad_token
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.inputs import (
    Inputs,
    digest_of,
    load_for_training,
    load_model,
    load_reward_network,
    model_parts,
    ready_for_training,
    share,
)
from fastalign.runs.state import TrainState
from fastalign.trainers.ppo.config import PolicyGradientConfig, PPOConfig
from fastalign.trainers.sampling.rollout import (
    SamplingSetup,
    load_prompt_sets,
    load_sources,
    open_policy_sampler,
)

# Among the numbers that a checkpoint holds.
SCORE_MEAN, SCORE_STD = "score_mean", "score_std"


class ActorCritic(nn.Module):
    """Policy and value model as one thing that is trained and saved."""

    def __init__(self, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.policy = policy
        self.value = value

    @property
    def clipped_apart(self) -> tuple[nn.Module, nn.Module]:
        """The parts whose gradients are clipped by norms of their own."""
        return self.policy, self.value


@dataclass(frozen=True)
class PPOModels:
    """The models of a PPO run.

    Attributes:
        policy: is trained and sampled from.
        reference: frozen; the policy itself where it has an adapter, which is then off.
        value: a reward model's network, or None without a critic.
        value_tokenizer: saved with the value model; has a pad token that ends no response.
    """

    policy: Any
    reference: Any
    value: Any
    value_tokenizer: Tokenizer | None

    @property
    def trained(self) -> Any:
        """The module whose parameters are trained."""
        return self.policy if self.value is None else ActorCritic(self.policy, self.value)


def load_ppo_models(config: PolicyGradientConfig, compute: Compute) -> tuple[PPOModels, Tokenizer]:
    """Load policy, reference and value model, and the policy's tokenizer."""
    policy, tokenizer = load_for_training(config, compute)
    reference = policy
    if config.reference.path is not None or not has_adapter(policy):
        path = config.reference.path or config.model.path
        reference, reference_tokenizer = load_model(path, config.model, compute)
        check_same_vocabulary(tokenizer, reference_tokenizer)
        share(reference.requires_grad_(False), compute)
    if config.kl.estimator == "full":
        check_full_kl(policy, reference)
    value, value_tokenizer = None, None
    if config.ppo.advantage.needs_value:
        assert isinstance(config, PPOConfig)
        value, value_tokenizer = load_value(config, tokenizer, compute)
    return PPOModels(policy, reference, value, value_tokenizer), tokenizer


def check_full_kl(policy: Any, reference: Any) -> None:
    """Raise ValueError if the heads differ in softcap or scale, or have an adapter."""
    ours, theirs = lm_head(policy), lm_head(reference)
    if ours.lora is not None:
        raise ValueError(
            "kl.estimator: expected k1, k2 or k3 with an adapter on the head "
            "(model.lora.targets), got full"
        )
    if (ours.softcap, ours.logit_scale) != (theirs.softcap, theirs.logit_scale):
        raise ValueError(
            "kl.estimator: expected k1, k2 or k3 where policy and reference cap or scale their "
            "logits differently, got full"
        )


def value_source(config: PPOConfig) -> str:
    """Return the path that the value model is loaded from."""
    networks = [source for source in config.reward.sources if is_reward_network(source)]
    return config.value.path or next(iter(networks), config.model.path)


def load_value(config: PPOConfig, tokenizer: Tokenizer, compute: Compute) -> tuple[Any, Tokenizer]:
    """Load the value model and its tokenizer; set its learning rate.

    A reward model keeps its head; a causal model gets one of zeros, since nothing is known yet.

    Raises:
        ValueError: if there is no such model, or its tokens are not the policy's.
    """
    path = value_source(config)
    name = "value.path" if config.value.path else "the value model (default of value.path)"
    trust = config.model.trust_remote_code
    if adapter_base(path) is not None:
        raise ValueError(f"{name}: {path} is an adapter; merge it first (fastalign merge)")
    try:
        fresh = not is_reward_model(read_config(path, trust_remote_code=trust), path)
        value = load_reward_network(path, config, compute)
        own = load_tokenizer(path, trust_remote_code=trust)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('model.path: ')}") from error
    check_same_vocabulary(tokenizer, own, name, may_have_more=True)
    if value.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise ValueError(
            f"{name}: expected at least the policy's {len(tokenizer)} tokens, got "
            f"{value.get_input_embeddings().weight.shape[0]} in {path}"
        )
    print(
        f"value model: {path}, head {'of zeros' if fresh else 'as it is there'}; attention: "
        f"{attention_name(value)}"
    )
    if fresh:
        torch.nn.init.zeros_(value.score.weight)
    if fresh or value.config.pad_token_id != own.pad_token_id:
        set_pad_token(value, use_distinct_pad(own, eos_token_ids(own, path)))
    if config.value.lr is not None:
        for parameter in value.parameters():
            parameter.lr_scale = config.value.lr / config.optim.lr
    return share(ready_for_training(value, config), compute), own


@dataclass(frozen=True, kw_only=True)
class PPOSetup(SamplingSetup):
    """The inputs of every PPO step.

    Attributes:
        models: policy, reference, value model.
        ptx: demonstrations that each update also learns, or None.
    """

    config: PolicyGradientConfig
    models: PPOModels
    ptx: Examples | None

    def inputs(self, reference_fingerprint: str | None) -> Inputs:
        """Return those of every algorithm that samples, the value model and the demonstrations."""
        found = super().inputs(reference_fingerprint)
        others = dict(found.others)
        if self.models.value is not None:
            others["value"] = model_parts(self.models.value)
        if self.ptx is not None:
            others["ptx_data"] = {"content": digest_of(repr(list(self.ptx.groups)))}
        return replace(found, others=others)


def prepare_ppo(config: PolicyGradientConfig, compute: Compute) -> PPOSetup:
    """Load models, reward sources, prompts and demonstrations; open the sampler."""
    sources = load_sources(config.reward, compute, config.data)
    models, tokenizer = load_ppo_models(config, compute)
    limiting = [m for m in (models.policy, models.reference, models.value) if m is not None]
    prompts, held_out = load_prompt_sets(
        config.data, config.sampling, limiting, tokenizer, sources.columns
    )
    ptx = load_ptx(config, tokenizer, compute)
    return PPOSetup(
        config=config,
        compute=compute,
        models=models,
        tokenizer=tokenizer,
        sampler=open_policy_sampler(config, models.policy, tokenizer, compute),
        sources=sources,
        prompts=prompts,
        held_out=held_out,
        ptx=ptx,
    )


def load_ptx(
    config: PolicyGradientConfig, tokenizer: Tokenizer, compute: Compute
) -> Examples | None:
    """Load the demonstrations of `ppo.ptx_data`, at most as long as a prompt with its answer."""
    if config.ppo.ptx_data is None:
        return None
    found = load_examples(
        config.ppo.ptx_data,
        "sft",
        tokenizer,
        max_length=config.data.max_length + config.sampling.max_new_tokens,
        on_bad_row=config.data.on_bad_row,
        on_too_long=config.data.on_too_long,
        advice="raise --data.max-length, or use --data.on-too-long skip",
    )
    found.report.print_losses()
    return measure_examples(found.groups, compute.packing)


def scale_of_scores(ppo: PPOSetup, state: TrainState) -> RewardScale | None:
    """Return the scale of scores: measured before the first step, then held by checkpoints."""
    if not ppo.config.reward.normalise:
        return None
    if SCORE_MEAN not in state.kept:
        found = ppo.measure_scale()
        state.kept |= {SCORE_MEAN: found.mean, SCORE_STD: found.std}
        print(f"scores: mean {found.mean:.4g}, standard deviation {found.std:.4g}")
    return RewardScale(state.kept[SCORE_MEAN], state.kept[SCORE_STD])


def advise_on_scale(config: PolicyGradientConfig, score: Tensor) -> None:
    """Warn if the scores' deviation exceeds 10 x `value.clip_range`: values could not catch up."""
    if not isinstance(config, PPOConfig):
        return
    spread, step = score.std(correction=0).item(), config.value.clip_range
    if config.ppo.advantage.needs_value and spread > 10 * step:
        print(
            f"scores have a standard deviation of {spread:.3g}, and a value moves by at most "
            f"{step:g} a step (value.clip_range); --reward.normalise brings scores to 1"
        )


def advise_on_estimator(config: PolicyGradientConfig) -> None:
    """Warn if the KL in the reward has a biased gradient."""
    kl = config.kl
    if kl.in_reward and kl.estimator in ("k2", "k3") and kl.coefficient:
        print(
            f"kl.estimator={kl.estimator} in the reward gives a biased KL gradient and may let the "
            "policy drift; use k1 or full, or put the KL into the loss (--kl loss)"
        )
