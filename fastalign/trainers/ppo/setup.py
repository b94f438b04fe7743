"""The inputs of every PPO step: models, sampler, prompts, reward sources, scale of scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.batch.schedule import indices_of_step
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
from fastalign.models.load import read_config, reward_adapter_base, save_reward_model
from fastalign.models.lora import add_second_adapter, has_adapter, like_first
from fastalign.models.lora_files import (
    WEIGHTS_FILE,
    adapter_base,
    check_no_adapter,
    is_reward_adapter,
    open_reward_adapter,
    print_other_format,
    save_adapter,
)
from fastalign.models.reward import (
    VALUE_HEAD,
    AdapterModel,
    RewardScale,
    add_value_head,
    set_pad_token,
)
from fastalign.models.shared_value import classifier_of, save_shared_value
from fastalign.ranks.whole_weights import writes
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.inputs import (
    Inputs,
    Parts,
    add_new_adapter,
    base_dtype,
    begins_with_adapter,
    digest_of,
    file_parts,
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

ON_BASE = "fastalign"  # how the names of further adapters begin, as no layer's name does
VALUE = "value"
# Among the numbers that a checkpoint holds.
SCORE_MEAN, SCORE_STD = "score_mean", "score_std"


class ActorCritic(nn.Module):
    """Policy and value model as one thing that is trained and saved.

    The value model may be a part of the policy's module: a head, or an adapter on its base.
    """

    def __init__(self, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.policy = policy
        self.value = value

    @property
    def clipped_apart(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters whose gradients are clipped by norms of their own."""
        of_value = list(self.value.parameters())
        taken = {id(parameter) for parameter in of_value}
        return [p for p in self.policy.parameters() if id(p) not in taken], of_value


@dataclass(frozen=True)
class PPOModels:
    """The models of a PPO run.

    Attributes:
        policy: is trained and sampled from.
        reference: frozen; the policy itself where it has an adapter, which is then off.
        value: a reward model's network; the policy itself where its layers have a value head; None
            without a critic.
        value_tokenizer: saved with the value model; has a pad token that ends no response.
        rewards: reward models on the policy's base, by their folders.
    """

    policy: Any
    reference: Any
    value: Any
    value_tokenizer: Tokenizer | None
    rewards: Mapping[str, AdapterModel] = field(default_factory=dict)

    @property
    def shares_trunk(self) -> bool:
        """True if values are read from the policy's own hidden states."""
        return self.value is not None and self.value is self.policy

    @property
    def trained(self) -> Any:
        """The module whose parameters are trained."""
        if self.value is None:
            return self.policy
        value = getattr(self.policy, VALUE_HEAD) if self.shares_trunk else self.value
        return ActorCritic(self.policy, value)


def shares_policy(config: PolicyGradientConfig) -> bool:
    """Return whether values are read from the policy's own hidden states."""
    return isinstance(config, PPOConfig) and config.value.share_policy


def load_ppo_models(config: PolicyGradientConfig, compute: Compute) -> tuple[PPOModels, Tokenizer]:
    """Load policy, reference and value model, and the policy's tokenizer."""
    opened: dict[str, AdapterModel] = {}  # on the policy's base
    needs_value = config.ppo.advantage.needs_value
    shares = needs_value and shares_policy(config)

    def extend(policy: Any) -> None:
        if shares:
            assert isinstance(config, PPOConfig)
            classifier_of(policy)  # as which its values are saved
            add_value_head(policy)
            scale_learning_rate(getattr(policy, VALUE_HEAD), config)
        if config.ppo.one_base:
            opened.update(open_on_base(config, policy))

    policy, tokenizer = load_for_training(config, compute, extend)
    reference = policy
    if config.reference.path is not None or not has_adapter(policy):
        path = config.reference.path or config.model.path
        reference, reference_tokenizer = load_model(path, config.model, compute)
        check_same_vocabulary(tokenizer, reference_tokenizer)
        share(reference.requires_grad_(False), compute)
    if config.kl.estimator == "full":
        check_full_kl(policy, reference)
    value, value_tokenizer = None, None
    if shares:
        value, path = policy, config.model.path
        value_tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
        use_distinct_pad(value_tokenizer, eos_token_ids(value_tokenizer, path))
    elif needs_value:
        assert isinstance(config, PPOConfig)
        value, value_tokenizer = load_value(config, tokenizer, compute, opened.pop(VALUE, None))
    return PPOModels(policy, reference, value, value_tokenizer, opened), tokenizer


def open_on_base(config: PolicyGradientConfig, policy: Any) -> dict[str, AdapterModel]:
    """Open reward models and the value model as adapters on the policy's frozen base.

    A value model that does not begin as a reward model gets a new adapter, as the policy's is.

    Returns:
        The reward models by their folders, and the value model by `VALUE`.

    Raises:
        ValueError: if one is no reward model's adapter, or is on another base.
    """
    found = {}
    for number, source in enumerate(config.reward.sources):
        if is_reward_network(source) and source not in found:
            check_on_base("reward.sources", source, config)
            found[source] = open_reward_adapter(policy, source, f"{ON_BASE}_reward_{number}")
            print(f"reward model: the adapter {source} on the policy's base")
            print_other_format(source, config.model.lora.base)
    if not config.ppo.advantage.needs_value or shares_policy(config):
        return found
    assert isinstance(config, PPOConfig)
    source, name = value_source(config), f"{ON_BASE}_{VALUE}"
    if is_base(source, config):
        rank = config.value.lora_rank or config.model.lora.rank
        add_second_adapter(policy, like_first(policy, rank), name)
        found[VALUE] = AdapterModel(policy, name)
    else:
        check_on_base("value.path", source, config)
        found[VALUE] = open_reward_adapter(policy, source, name)
    return found


def is_base(path: str, config: PolicyGradientConfig) -> bool:
    """Return whether a path is that of the policy's base."""
    ours = start_of(config)
    local = Path(path).expanduser().exists() and Path(ours).expanduser().exists()
    same = local and Path(path).expanduser().samefile(Path(ours).expanduser())
    return same or path == ours


def check_on_base(name: str, path: str, config: PolicyGradientConfig) -> None:
    """Raise ValueError, for the setting `name`, unless a reward model is an adapter on the base."""
    base = adapter_base(path) if is_reward_adapter(path) else None
    if base is None:
        raise ValueError(
            f"{name}: expected a reward model's adapter with ppo.one_base (fastalign reward "
            f"--model.lora.rank writes one), got {path}"
        )
    if not is_base(base, config):
        raise ValueError(
            f"{name}: expected an adapter on the policy's base {start_of(config)} with "
            f"ppo.one_base; {path} is on {base}"
        )


def scale_learning_rate(value: nn.Module, config: PPOConfig) -> None:
    """Give the value model's parameters `value.lr`, if it is set."""
    if config.value.lr is not None:
        for parameter in value.parameters():
            parameter.lr_scale = config.value.lr / config.optim.lr  # type: ignore[attr-defined]


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
    if config.value.share_policy:
        return start_of(config)
    networks = [source for source in config.reward.sources if is_reward_network(source)]
    return config.value.path or next(iter(networks), start_of(config))


def start_of(config: PolicyGradientConfig) -> str:
    """Return the path of the policy's whole weights: of an adapter that is trained, its base's."""
    path = config.model.path
    return (adapter_base(path) or path) if begins_with_adapter(config.model) else path


def load_value(
    config: PPOConfig, tokenizer: Tokenizer, compute: Compute, on_base: AdapterModel | None = None
) -> tuple[Any, Tokenizer]:
    """Load the value model, unless it is `on_base` already, and its tokenizer.

    A reward model keeps its head; a causal model gets one of zeros, since nothing is known yet.

    Raises:
        ValueError: if there is no such model, or its tokens are not the policy's.
    """
    path = value_source(config)
    name = "value.path" if config.value.path else "the value model (default of value.path)"
    trust = config.model.trust_remote_code
    if config.value.lora_rank:
        check_no_adapter("value.lora_rank", path)
    try:
        adapter = reward_adapter_base(path) is not None
        fresh = not adapter and not is_reward_model(
            read_config(path, trust_remote_code=trust), path
        )
        value = value_network(path, config, compute, adapter) if on_base is None else on_base
        own = load_tokenizer(path, trust_remote_code=trust)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('model.path: ')}") from error
    check_same_vocabulary(tokenizer, own, name, may_have_more=True)
    if on_base is None and value.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise ValueError(
            f"{name}: expected at least the policy's {len(tokenizer)} tokens, got "
            f"{value.get_input_embeddings().weight.shape[0]} in {path}"
        )
    how = f"; attention: {attention_name(value)}" if on_base is None else " on the policy's base"
    print(f"value model: {path}, head {'of zeros' if fresh else 'as it is there'}{how}")
    if fresh:
        torch.nn.init.zeros_(value.score.weight)
    if fresh or value.config.pad_token_id != own.pad_token_id:
        set_pad_token(value, use_distinct_pad(own, eos_token_ids(own, path)))
    scale_learning_rate(value, config)
    if on_base is not None:
        return share(value.requires_grad_(True), compute), own
    return share(ready_for_training(value, config), compute), own


def value_network(path: str, config: PPOConfig, compute: Compute, is_adapter: bool) -> Any:
    """Load a value model of its own: all weights, an adapter in `path`, or a new one.

    The frozen base of an adapter has the format of the policy's (`model.lora.base`).
    """
    if not is_adapter and not config.value.lora_rank:
        return load_reward_network(path, config, compute)
    dtype, nf4 = base_dtype(config.model, compute), config.model.lora.base == "nf4"
    value = load_reward_network(
        path, config, compute, dtype=dtype, nf4=nf4, keep_adapter=is_adapter
    )
    if config.value.lora_rank:
        add_new_adapter(value, config.model, config.value.lora_rank)
    return value


def value_parts(config: PPOConfig, models: PPOModels) -> Parts:
    """Return what decides where the value model starts; a new adapter's weights are drawn anew."""
    source, on_base = value_source(config), isinstance(models.value, AdapterModel)
    parts = dict(model_parts(models.value, weights=not on_base))
    if is_reward_adapter(source):
        parts |= file_parts(Path(source).expanduser() / WEIGHTS_FILE)
    return parts


def save_value(models: PPOModels, folder: Path) -> None:
    """Write the value model: a reward model's network, or its adapter in peft's layout."""
    value, tokenizer = models.value, models.value_tokenizer
    assert tokenizer is not None
    head = getattr(value, VALUE_HEAD) if models.shares_trunk else None
    if not isinstance(value, AdapterModel) and not has_adapter(value):
        write = save_reward_model if head is None else save_shared_value
        write(value, tokenizer, folder)
        return
    pad_token_id = None if head is None else tokenizer.pad_token_id
    save_adapter(value, folder, head=head, pad_token_id=pad_token_id)
    if writes(value):
        tokenizer.save_pretrained(folder)


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
        if self.models.value is not None and not self.models.shares_trunk:
            assert isinstance(self.config, PPOConfig)
            others["value"] = value_parts(self.config, self.models)
        if self.ptx is not None:
            others["ptx_data"] = {"content": digest_of(repr(list(self.ptx.groups)))}
        return replace(found, others=others)


def prepare_ppo(config: PolicyGradientConfig, compute: Compute) -> PPOSetup:
    """Load models, reward sources, prompts and demonstrations; open the sampler."""
    if not config.ppo.one_base:  # the settings' cheapest mistakes come first
        sources = load_sources(config.reward, compute, config.data)
    models, tokenizer = load_ppo_models(config, compute)
    if config.ppo.one_base:
        sources = load_sources(config.reward, compute, config.data, models.rewards)
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


def demonstrations_of(ppo: PPOSetup, number: int) -> list[int]:
    """Return the demonstrations that one update learns."""
    assert ppo.ptx is not None
    size = max(1, ppo.config.train.batch_size // ppo.config.ppo.mini_batches)
    return indices_of_step(len(ppo.ptx.groups), size, number, seed=ppo.config.run.seed)


def num_examples_of_updates(ppo: PPOSetup) -> int:
    """Return the number of examples that the forwards of a step's updates take, of all models."""
    config, settings = ppo.config, ppo.config.ppo
    number = config.train.batch_size * (1 if ppo.models.value is None else 2)
    if ppo.ptx is not None:
        number += settings.mini_batches * len(demonstrations_of(ppo, 0))
    return settings.epochs * number
