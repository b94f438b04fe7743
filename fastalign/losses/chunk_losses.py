"""Losses as functions of a chunk of tokens, which `fused_linear_loss` calls.

B pairs, whose 2B responses lie in the order chosen, rejected, chosen, rejected, ...
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.losses.policy import (
    MAX_LOG_RATIO,
    PolicyTerms,
    clip_terms,
    negative_logprob,
    probability_ratio,
)
from fastalign.losses.unpaired import kto
from fastalign.ops.head.fused_linear_loss import LossFunction, TokenChunk
from fastalign.ops.kl_penalty import KLPenalty, kl_penalty
from fastalign.ops.kl_penalty.api import MAX_K3, Estimator
from fastalign.ops.preference_loss import PairLogprobs, PreferenceFormula, preference_loss
from fastalign.ops.segments import segment_sum

PairLoss = Callable[[PairLogprobs], Tensor]


class Responses(NamedTuple):
    """The responses of n rows."""

    bounds: Tensor  # (R + 1,) int64
    length: Tensor  # (R,) int64 number of rows that are targets


# (logprob, old log-prob, advantage, responses, max_log_ratio) -> the terms; the tensors are (n,),
# and 0 where a row is no target.
PolicyTermsFunction = Callable[[Tensor, Tensor, Tensor, Responses | None, float], PolicyTerms]


def preference_loss_fn(
    pair_loss: PairLoss,
    response_bounds: Tensor | Sequence[int],  # (2B + 1,)
    reference_logprob: Tensor | None,  # (2B,)
    *,
    normaliser: float | Tensor,
    tie: Tensor | None = None,  # (B,) bool
    margin: Tensor | None = None,  # (B,)
    beta: float = 0.1,
) -> LossFunction:
    """Make a loss of preference pairs for `fused_linear_loss`, whose groups must be the pairs.

    The call's `segments` are `response_bounds[::2]`; a chunk may hold any number of pairs.

    Args:
        pair_loss: `formula(dpo, beta=0.1)`, which the kernels of `preference_loss` compute; or
            any function from `PairLogprobs` of B pairs to losses (B,), for example
            `lambda pairs: dpo(*pairs.logprobs(), beta=0.1)`.
        response_bounds: row bounds of the responses, in the order chosen, rejected, chosen, ...
        reference_logprob: the reference model's log-prob of each response, or None.
        normaliser: divisor of the sum of the pairs' losses: pairs of the *whole* step.
        tie: pairs that are ties; None: no pair is.
        margin: passed on to a function; a formula takes none.
        beta: scale of the rewards in the metrics.

    Returns:
        The loss function. Its metrics are sums: over pairs `logps/chosen`, `logps/rejected`,
        `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (without
        ties), counted by `num_pairs` and `num_ties`, and `nll_loss` if the formula has such a term;
        over tokens `entropy` and
        `mean_token_accuracy`, counted by `num_target_tokens`.

    Raises:
        ValueError: if lengths do not fit each other, or a formula is given a margin.
    """
    if margin is not None and isinstance(pair_loss, PreferenceFormula):
        raise ValueError(
            f"margin: expected None, for the formula {pair_loss.name} takes none, got a tensor"
        )
    bounds = torch.as_tensor(response_bounds, dtype=torch.int64)
    num_responses = bounds.numel() - 1
    if num_responses < 0 or num_responses % 2:
        raise ValueError(
            f"response_bounds: expected 2B + 1 bounds, an odd number, got {bounds.numel()}"
        )
    _check_length("reference_logprob", reference_logprob, num_responses)
    _check_length("tie", tie, num_responses // 2)
    _check_length("margin", margin, num_responses // 2)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = slice(chunk.group_start, chunk.group_stop)
        responses = slice(2 * chunk.group_start, 2 * chunk.group_stop)
        device = chunk.logprob.device

        def moved(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)  # does not wait for the GPU

        local = moved(bounds[responses.start : responses.stop + 1] - chunk.row_start)
        losses, found = _pair_losses(
            pair_loss,
            chunk,
            local,
            None if reference_logprob is None else moved(reference_logprob[responses]),
            None if tie is None else moved(tie[pairs]),
            None if margin is None else moved(margin[pairs]),
        )
        metrics = {**_pair_metrics(found, beta), **token_metrics(chunk)}
        if isinstance(pair_loss, PreferenceFormula) and pair_loss.has_nll:
            metrics["nll_loss"] = found.chosen_nll().sum()
        return losses.sum() / normaliser, metrics

    return loss_fn


def kto_loss_fn(
    response_bounds: Tensor | Sequence[int],  # (B + 1,)
    reference_logprob: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl: float | Tensor,  # or ()
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    normaliser: float | Tensor,
) -> LossFunction:
    """Make KTO's loss for `fused_linear_loss`, whose groups must be the responses.

    Args:
        response_bounds: row bounds of the responses, which are the call's `segments`.
        reference_logprob: the reference model's log-prob of each response.
        desirable: True for the responses that were found good.
        kl: as in `kto`.
        beta: as in `kto`; also the scale of the rewards in the metrics.
        desirable_weight: as in `kto`.
        undesirable_weight: as in `kto`.
        normaliser: number of responses of the *whole* step.

    Returns:
        The loss function. Its metrics are sums: over good responses, counted by `num_desirable`,
        `logps/chosen` and `rewards/chosen`; over bad ones, counted by `num_undesirable`,
        `logps/rejected` and `rewards/rejected`; over tokens those of `sft_loss_fn`.

    Raises:
        ValueError: if lengths do not fit each other.
    """
    bounds = torch.as_tensor(response_bounds, dtype=torch.int64)
    _check_length("reference_logprob", reference_logprob, bounds.numel() - 1)
    _check_length("desirable", desirable, bounds.numel() - 1)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        own, device = slice(chunk.group_start, chunk.group_stop), chunk.logprob.device
        local = bounds[own.start : own.stop + 1] - chunk.row_start
        logprob = segment_sum(chunk.logprob, local.to(device, non_blocking=True))
        reference = reference_logprob[own].to(logprob, non_blocking=True)
        good = desirable[own].to(device, non_blocking=True)
        losses = kto(
            logprob,
            reference,
            good,
            kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        found, metrics = logprob.detach(), {}
        rewards = beta * (found - reference)
        for name, count, chosen in (
            ("chosen", "num_desirable", good),
            ("rejected", "num_undesirable", ~good),
        ):
            metrics[count] = chosen.sum()
            metrics[f"logps/{name}"] = found.masked_fill(~chosen, 0.0).sum()
            metrics[f"rewards/{name}"] = rewards.masked_fill(~chosen, 0.0).sum()
        return losses.sum() / normaliser, {**metrics, **token_metrics(chunk)}

    return loss_fn


def sft_loss_fn(*, normaliser: float | Tensor) -> LossFunction:
    """Make the loss of `fused_linear_loss` that is cross-entropy over `normaliser`.

    Args:
        normaliser: number of target tokens of the *whole* step.

    Returns:
        The loss function. Its metrics are sums over tokens: `entropy`, `mean_token_accuracy`,
        counted by `num_target_tokens`.
    """

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        return negative_logprob(chunk.logprob).sum() / normaliser, token_metrics(chunk)

    return loss_fn


def ppo_loss_fn(
    old_logprob: Tensor | None,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
    policy_terms: PolicyTermsFunction | None = None,
    response_bounds: Sequence[int] | None = None,  # (R + 1,)
    entropy_coefficient: float = 0.0,
    weight: Tensor | None = None,  # (T,)
    token_weight: Tensor | None = None,  # (T,)
    reference_logprob: Tensor | None = None,  # (T,)
    kl_coefficient: float = 0.0,
    kl_by_ratio: bool = False,
    estimator: Estimator = "k3",
    max_log_ratio: float = MAX_LOG_RATIO,
    max_k3: float = MAX_K3,
    normaliser: float | Tensor,
) -> LossFunction:
    """Make PPO's loss for `fused_linear_loss`: clipped loss minus entropy bonus, over `normaliser`.

    With a `reference_logprob` it adds a KL to the reference: `kl_coefficient` times the estimate of
    `ops.kl_penalty`.

    Args:
        old_logprob: log-probs under the policy that sampled, for all rows of the call; None: this
            call's policy is that one, and its own log-probs are the old ones.
        advantage: advantages, for all rows of the call.
        clip_range: as in `ppo_clip`.
        policy_terms: another policy loss, from the arguments of `PolicyTermsFunction`; None:
            `ppo_clip`.
        response_bounds: row bounds of the responses, of which a chunk must hold whole ones; for a
            `policy_terms` that compares responses.
        entropy_coefficient: weight of the entropy bonus.
        weight: factor of each token's policy loss (`importance_weight`), for all rows; None: 1.
        token_weight: factor of all of a token's terms, for all rows: 1 over the length of its
            response for a mean over responses; None: 1, for a mean over tokens.
        reference_logprob: log-probs under the reference, for all rows; None: no KL in the loss.
        kl_coefficient: weight of the KL.
        kl_by_ratio: multiply each token's KL by its ratio, exp(logprob - old_logprob), through
            which its gradient also flows: an unbiased estimate after the policy has moved
            (DeepSeek-V3.2, arXiv 2512.02556, "unbiased KL estimate").
        estimator: `k2` or `k3`; the gradient of `k1` is zero in expectation.
        max_log_ratio: as in `ppo_clip`.
        max_k3: as in `ops.kl_penalty`.
        normaliser: number of target tokens (or responses) of the *whole* step.

    Returns:
        The loss function. Its metrics are sums over target tokens: `policy/approxkl_avg`,
        `policy/clipfrac_avg`, `policy/entropy_avg`, `val/ratio`, with a reference `policy/kl_avg`,
        the number of tokens that one of the two bounds changed, `policy/num_clamped`, and those
        of `sft_loss_fn`.

    Raises:
        ValueError: if the estimator of a KL in the loss is `k1`.
    """
    if reference_logprob is not None and estimator == "k1":
        raise ValueError("estimator: expected 'k2' or 'k3' for a KL in the loss, got 'k1'")

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        rows, target = slice(chunk.row_start, chunk.row_stop), chunk.is_target
        before = chunk.logprob.detach() if old_logprob is None else old_logprob[rows]
        old = torch.where(target, before.to(chunk.logprob), 0.0)
        advantages = torch.where(target, advantage[rows].to(chunk.logprob), 0.0)

        def total(values: Tensor) -> Tensor:
            if token_weight is not None:
                values = values * token_weight[rows].to(values)
            return values.sum() / normaliser

        if policy_terms is None:
            change = chunk.logprob - old
            options = {"clip_range": clip_range, "max_log_ratio": max_log_ratio}
            found = clip_terms(change, advantages, **options)
        else:
            responses = _responses_of_chunk(chunk, response_bounds)
            found = policy_terms(chunk.logprob, old, advantages, responses, max_log_ratio)
        losses = found.losses if weight is None else found.losses * weight[rows].to(chunk.logprob)
        loss = total(losses)
        if entropy_coefficient:
            loss = loss - entropy_coefficient * total(chunk.entropy)
        clamped, more = (found.log_ratio.abs() > max_log_ratio) & target, {}
        if reference_logprob is not None:
            estimate = _kl_of_chunk(chunk, reference_logprob[rows], estimator, max_k3)
            kl = estimate.kl
            if kl_by_ratio:
                kl = kl * probability_ratio(chunk.logprob, old, max_log_ratio=max_log_ratio)
            loss = loss + kl_coefficient * total(kl)
            more["policy/kl_avg"] = estimate.sequence_kl[0].detach()
            clamped |= (estimator == "k3") & (estimate.kl >= max_k3)
        return loss, {**_policy_metrics(chunk, old, found, clamped, max_log_ratio), **more}

    return loss_fn


def _policy_metrics(
    chunk: TokenChunk, old: Tensor, found: PolicyTerms, clamped: Tensor, max_log_ratio: float
) -> dict[str, Tensor]:
    change = (chunk.logprob - old).detach()
    ratio = found.log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    clipped = found.clipped & chunk.is_target
    return {
        "policy/approxkl_avg": 0.5 * change.square().sum(),
        "policy/clipfrac_avg": clipped.to(ratio.dtype).sum(),
        "policy/entropy_avg": chunk.entropy.sum(),
        "policy/num_clamped": clamped.to(ratio.dtype).sum(),
        "val/ratio": (ratio * chunk.is_target).sum(),
        **token_metrics(chunk),
    }


def _responses_of_chunk(chunk: TokenChunk, bounds: Sequence[int] | None) -> Responses | None:
    """Return the responses that a chunk holds, by its own rows; None without bounds.

    Raises:
        ValueError: if it holds a part of a response.
    """
    if bounds is None:
        return None
    first, last = bisect_left(bounds, chunk.row_start), bisect_right(bounds, chunk.row_stop)
    own = [bound - chunk.row_start for bound in bounds[first:last]]
    if not own or own[0] != 0 or own[-1] != chunk.row_stop - chunk.row_start:
        raise ValueError(
            "response_bounds: expected whole responses in every chunk, got a part of one; give "
            "fused_linear_loss segments of whole responses"
        )
    local = torch.tensor(own).to(chunk.logprob.device, non_blocking=True)
    return Responses(local, segment_sum(chunk.is_target.to(chunk.logprob), local).long())


def _kl_of_chunk(
    chunk: TokenChunk, reference_logprob: Tensor, estimator: Estimator, max_k3: float
) -> KLPenalty:
    """Return the KL estimates of the chunk's targets, as one sequence."""
    reference = reference_logprob.to(chunk.logprob)
    bounds = torch.tensor([0, chunk.logprob.numel()]).to(reference.device, non_blocking=True)
    return kl_penalty(
        chunk.logprob,
        reference,
        bounds,
        coefficient=0.0,
        estimator=estimator,
        mask=chunk.is_target,
        max_k3=max_k3,
    )


def _check_length(name: str, value: Tensor | None, length: int) -> None:
    if value is not None and value.shape != (length,):
        raise ValueError(f"{name}: expected ({length},), got {tuple(value.shape)}")


def _pair_losses(
    pair_loss: PairLoss,
    chunk: TokenChunk,
    bounds: Tensor,  # (2B + 1,)
    reference_logprob: Tensor | None,  # (2B,)
    tie: Tensor | None,  # (B,)
    margin: Tensor | None,  # (B,)
) -> tuple[Tensor, PairLogprobs]:
    """Return the losses (B,) of a chunk's pairs, and the pairs."""
    length = segment_sum(chunk.is_target.float(), bounds).long()
    if isinstance(pair_loss, PreferenceFormula):
        losses, logprob = preference_loss(
            chunk.logprob,
            bounds,
            pair_loss,
            reference_logprob if pair_loss.needs_reference else None,
            length=length,
            tie=tie if pair_loss.uses_ties else None,
        )
        return losses, PairLogprobs.from_responses(logprob, reference_logprob, length, tie)
    logprob = segment_sum(chunk.logprob, bounds)
    found = PairLogprobs.from_responses(logprob, reference_logprob, length, tie, margin)
    losses = pair_loss(found)
    if losses.shape != found.policy_chosen_logprob.shape:
        raise ValueError(
            f"pair_loss: expected one loss for each of {found.tie.numel()} pairs, "
            f"got {tuple(losses.shape)}"
        )
    return losses, found


def token_metrics(chunk: TokenChunk) -> dict[str, Tensor]:
    """Return `entropy` and `mean_token_accuracy`, sums over tokens, and their count."""
    return {
        "entropy": chunk.entropy.sum(),
        "mean_token_accuracy": chunk.is_argmax.to(chunk.logprob.dtype).sum(),
        "num_target_tokens": chunk.is_target.sum(),
    }


def _pair_metrics(pairs: PairLogprobs, beta: float) -> dict[str, Tensor]:
    chosen, rejected = pairs.implicit_rewards(beta)
    return {
        "num_pairs": torch.full((), pairs.tie.numel(), device=chosen.device),
        "num_ties": pairs.tie.sum(),
        "logps/chosen": pairs.policy_chosen_logprob.sum(),
        "logps/rejected": pairs.policy_rejected_logprob.sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": ((chosen > rejected) & ~pairs.tie).to(chosen.dtype).sum(),
        "rewards/margins": (chosen - rejected).sum(),
    }
