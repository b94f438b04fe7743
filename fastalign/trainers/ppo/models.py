"""The models of a PPO run: policy, frozen reference, value model, and whether they fit together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.data import (
    Tokenizer,
    check_same_vocabulary,
    check_token_meanings,
    eos_token_ids,
    load_tokenizer,
    use_distinct_pad,
)
from fastalign.models import (
    AttentionPlan,
    adapter_base,
    adapter_off,
    attention_name,
    has_adapter,
    hidden_at,
    is_reward_model,
    lm_head,
    read_config,
    reward_scale,
    save_reward_model,
    score_at,
    set_pad_token,
)
from fastalign.ops import LinearHead, LinearKL, linear_kl
from fastalign.ranks.parallel import enter, is_sharded
from fastalign.runs.load_models import (
    load_for_training,
    load_model,
    load_reward_network,
    ready_for_training,
    share,
)
from fastalign.trainers.ppo.config import PPOConfig


class ActorCritic(nn.Module):
    """Policy and value model as one thing that is trained and saved.

    Args:
        policy: a causal model, or a frozen base with an adapter.
        value: a reward model's network.
    """

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

    @property
    def frozen(self) -> Any:
        """A model that is no part of what is trained, or None."""
        return None if self.reference is self.policy else self.reference

    def with_fewest_positions(self) -> Any:
        """Return the model with the fewest positions, which limits a prompt with its answer."""
        models: Sequence[Any] = [
            m for m in (self.policy, self.reference, self.value) if m is not None
        ]
        return min(
            models, key=lambda m: getattr(m.config, "max_position_embeddings", None) or 2**31
        )

    def save_value(self, folder: Path) -> None:
        """Write the value model in a reward model's layout."""
        save_reward_model(self.value, self.value_tokenizer, folder)


def load_ppo_models(config: PPOConfig, compute: Compute) -> tuple[PPOModels, Tokenizer]:
    """Load policy, reference and value model, and the policy's tokenizer.

    Raises:
        ValueError: if a model cannot be loaded, or its tokens mean something else.
    """
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
        value, value_tokenizer = load_value(config, tokenizer, compute)
    return PPOModels(policy, reference, value, value_tokenizer), tokenizer


def check_full_kl(policy: Any, reference: Any) -> None:
    """Check that one pass can read both heads.

    Raises:
        ValueError: if the head has an adapter, or the heads' softcaps or scales differ.
    """
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


def token_values(
    value: Any, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> Tensor:
    """Return the value (N,) of the state that each token was drawn in.

    On the scale of the rewards: a reward model's scores are normalised by its `reward_mean` and
    `reward_std`, and so are the values that begin as its scores.
    """
    raw = score_at(value, batch, batch.predict_index, compute, plan)
    return reward_scale(value).normalise(raw)


def value_source(config: PPOConfig) -> str:
    """Return the path that the value model is loaded from."""
    folders = [source for source in config.reward.sources if Path(source).is_dir()]
    return config.value.path or next(iter(folders), config.model.path)


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
        fresh = not is_reward_model(read_config(path, trust_remote_code=trust))
        value = load_reward_network(path, config, compute)
        own = load_tokenizer(path, trust_remote_code=trust)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('model.path: ')}") from error
    check_token_meanings(tokenizer, own, name)
    if value.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise ValueError(
            f"{name}: expected at least the policy's {len(tokenizer)} tokens, got "
            f"{value.get_input_embeddings().weight.shape[0]} in {path}"
        )
    print(
        f"value model: {path}, head {'of zeros' if fresh else 'as it is there'}; attention: "
        f"{attention_name(value)}",
        flush=True,
    )
    if fresh:
        torch.nn.init.zeros_(value.score.weight)
    if fresh or value.config.pad_token_id != own.pad_token_id:
        set_pad_token(value, use_distinct_pad(own, eos_token_ids(own, path)))
    if config.value.lr is not None:
        for parameter in value.parameters():
            parameter.lr_scale = config.value.lr / config.optim.lr
    return share(ready_for_training(value, config), compute), own


def hidden_and_head(
    model: object, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> tuple[Tensor, LinearHead]:
    """Return hidden states (N, D) that predict the sampled tokens, and the head that reads them."""
    return hidden_at(model, batch, batch.predict_index, compute, plan), lm_head(model)


@torch.no_grad()
def reference_head(
    reference: object, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> tuple[Tensor, LinearHead]:
    """Return `hidden_and_head` of the frozen model; if it is sharded, with a copy of its head."""

    def of_reference() -> tuple[Tensor, LinearHead]:
        hidden, head = hidden_and_head(reference, batch, compute, plan)
        if not is_sharded(reference):
            return hidden, head
        bias = None if head.bias is None else head.bias.clone()
        return hidden, replace(head, weight=head.weight.clone(), bias=bias)

    with adapter_off(reference):
        return enter(reference, of_reference)


def shared_plan(batch: PackedBatch, compute: Compute) -> AttentionPlan | None:
    """Return one plan of the batch's attention for every model; None for padded batches."""
    return None if compute.packing == "padded" else AttentionPlan(batch)


def both_heads(
    policy: tuple[Tensor, LinearHead],
    reference: tuple[Tensor, LinearHead],
    targets: Tensor,
    compute: Compute,
    temperature: float,
) -> LinearKL:
    """Return log-probs, entropy and the KL over the vocabulary, each (N,), in one pass."""
    return linear_kl(
        *policy,
        *reference,
        targets,
        temperature=temperature,
        compute_dtype=compute.product_dtype,
        max_buffer_bytes=compute.max_buffer_bytes,
    )
