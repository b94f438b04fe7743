"""PPO's losses of a micro-batch: the policy's, fused with its head, and the value model's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.batch import PackedBatch
from fastalign.fused import ppo_loss_fn
from fastalign.losses import importance_weight, value_clipped
from fastalign.ops import TokenChunk, linear_kl
from fastalign.ops.fused_linear_loss import LossFunction
from fastalign.trainers.accumulate import BatchLoss, Examples
from fastalign.trainers.compute import Compute
from fastalign.trainers.ppo_config import KLConfig, PPOConfig
from fastalign.trainers.ppo_heads import head_options, hidden_and_head, reference_head, shared_plan
from fastalign.trainers.ppo_models import PPOModels, token_values
from fastalign.trainers.ppo_tokens import TokenRecord
from fastalign.trainers.step import MakeLoss, policy_loss


@dataclass(frozen=True)
class Update:
    """What all updates of a step share.

    Attributes:
        config: of the run.
        compute: how forwards are run.
        models: of the run.
        examples: the rollouts' groups.
        record: their tokens, before the updates.
        advantage: (N,).
        returns: (N,), what values should be; None without a value model.
        kl_coefficient: of this step.
        exact_kl_coefficient: of the exact KL in the loss (`find_exact_kl_coefficient`); 0: none.
        ptx: demonstrations, or None.
    """

    config: PPOConfig
    compute: Compute
    models: PPOModels
    examples: Examples
    record: TokenRecord
    advantage: Tensor
    returns: Tensor | None
    kl_coefficient: float
    exact_kl_coefficient: float
    ptx: Examples | None

    @property
    def weight(self) -> Tensor | None:
        """Of each token's policy loss (N,), where the sampler's drift is to be corrected."""
        most = self.config.ppo.max_importance_weight
        if most is None:
            return None
        return importance_weight(self.record.logprob, self.record.sampler_logprob, max_weight=most)


def make_ppo_loss(update: Update, normaliser: int) -> MakeLoss:
    """The policy's loss of each micro-batch: clipped, less an entropy bonus, plus a sampled KL."""
    settings, kl, record = update.config.ppo, update.config.kl, update.record
    sampled = kl.place == "loss" and kl.estimator != "full"
    weight = update.weight

    def make_loss(batch: PackedBatch, chosen: list[int]) -> tuple[LossFunction, None]:
        rows = record.rows_of(chosen)
        device = batch.targets.device
        loss_fn = ppo_loss_fn(
            record.logprob[rows].to(device),
            update.advantage[rows].to(device),
            clip_range=settings.clip_range,
            entropy_coefficient=settings.entropy_coefficient,
            weight=None if weight is None else weight[rows].to(device),
            reference_logprob=record.reference_logprob[rows].to(device) if sampled else None,
            kl_coefficient=update.kl_coefficient,
            estimator="k3" if kl.estimator == "full" else kl.estimator,
            normaliser=normaliser,
        )
        return loss_fn, None

    return make_loss


def find_exact_kl_coefficient(config: KLConfig, coefficient: float, scale: float) -> float:
    """The weight of the exact KL in the loss, which it needs where it is in the reward too.

    -KL_t as a reward is the same whatever token is drawn at t: a policy gradient sees what a token
    does to the KL of later states, and misses the derivative of KL_t itself. That derivative, in
    the advantage's scale, makes it the gradient of the whole KL (arXiv 2504.10637). k1 has no need
    of it: its derivative has the mean 0.
    """
    if config.estimator != "full":
        return 0.0
    return coefficient if config.place == "loss" else coefficient * scale


def policy_batch_loss(update: Update, normaliser: int) -> BatchLoss:
    """The policy's loss, fused with its head."""
    make_loss = make_ppo_loss(update, normaliser)
    temperature = update.config.sampling.temperature
    if not update.exact_kl_coefficient:
        return policy_loss(update.models.policy, make_loss, update.compute, temperature=temperature)
    return full_kl_batch_loss(update, make_loss, normaliser)


def full_kl_batch_loss(update: Update, make_loss: MakeLoss, normaliser: int) -> BatchLoss:
    """The same plus the exact KL over the vocabulary, which needs the reference's hidden states."""
    models, compute = update.models, update.compute

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        plan = shared_plan(batch, compute)
        reference, of_reference = reference_head(models.reference, batch, compute, plan)
        hidden, head = hidden_and_head(models.policy, batch, compute, plan)
        found = linear_kl(
            hidden,
            head.weight,
            reference,
            of_reference.weight,
            batch.targets,
            bias=head.bias,
            reference_bias=of_reference.bias,
            **head_options(head, compute, update.config.sampling.temperature),  # type: ignore[arg-type]
        )
        of_all = torch.ones_like(batch.targets, dtype=torch.bool)
        ends = (0, batch.num_targets, 0, batch.num_targets)
        chunk = TokenChunk(found.logprob, found.entropy, ~of_all, of_all, *ends)
        loss, sums = make_loss(batch, chosen)[0](chunk)
        kl = found.kl.sum()
        sums = {name: value.detach() for name, value in sums.items()}
        del sums["mean_token_accuracy"]  # this pass does not compare logits
        sums["policy/kl_avg"] = kl.detach()
        return loss + update.exact_kl_coefficient * kl / normaliser, sums

    return BatchLoss(models.policy, of_batch)


def value_batch_loss(update: Update, normaliser: int) -> BatchLoss:
    """The clipped value loss times its coefficient."""
    settings, record, returns = update.config.value, update.record, update.returns
    old = record.value
    assert old is not None
    assert returns is not None

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = record.rows_of(chosen)
        value = token_values(update.models.value, batch, update.compute, None)
        before, target = old[rows].to(value), returns[rows].to(value)
        losses = value_clipped(value, before, target, clip_range=settings.clip_range)
        clipped = losses.detach() > (value.detach() - target).square() / 2
        return settings.coefficient * losses.sum() / normaliser, {
            "val/clipfrac_avg": clipped.float().sum(),
            "num_target_tokens": torch.tensor(len(rows)),
        }

    return BatchLoss(update.models.value, of_batch)
