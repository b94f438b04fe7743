"""Losses as functions of a chunk of tokens, which `fused_linear_loss` calls.

B pairs, whose 2B responses lie in the order chosen, rejected, chosen, rejected, ...
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastalign.losses.policy import MAX_LOG_RATIO, negative_logprob, ppo_clip
from fastalign.ops.head.fused_linear_loss import LossFunction, TokenChunk
from fastalign.ops.kl_penalty import KLPenalty, kl_penalty
from fastalign.ops.kl_penalty.api import MAX_K3, Estimator
from fastalign.ops.preference_loss import PairLogprobs, PreferenceFormula, preference_loss
from fastalign.ops.segments import segment_sum

PairLoss = Callable[[PairLogprobs], Tensor]


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
        ties), counted by `num_pairs` and `num_ties`; over tokens `entropy` and
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
        metrics = {**_pair_metrics(found, beta), **_token_metrics(chunk)}
        return losses.sum() / normaliser, metrics

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
        return negative_logprob(chunk.logprob).sum() / normaliser, _token_metrics(chunk)

    return loss_fn


def ppo_loss_fn(
    old_logprob: Tensor | None,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
    entropy_coefficient: float = 0.0,
    weight: Tensor | None = None,  # (T,)
    reference_logprob: Tensor | None = None,  # (T,)
    kl_coefficient: float = 0.0,
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
        entropy_coefficient: weight of the entropy bonus.
        weight: factor of each token's clipped loss (`importance_weight`), for all rows; None: 1.
        reference_logprob: log-probs under the reference, for all rows; None: no KL in the loss.
        kl_coefficient: weight of the KL.
        estimator: `k2` or `k3`; the gradient of `k1` is zero in expectation.
        max_log_ratio: as in `ppo_clip`.
        max_k3: as in `ops.kl_penalty`.
        normaliser: number of target tokens of the *whole* step.

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
        losses = ppo_clip(
            chunk.logprob, old, advantages, clip_range=clip_range, max_log_ratio=max_log_ratio
        )
        weighted = losses if weight is None else losses * weight[rows].to(losses)
        loss = weighted.sum() / normaliser
        if entropy_coefficient:
            loss = loss - entropy_coefficient * chunk.entropy.sum() / normaliser
        change = (chunk.logprob - old).detach()
        ratio = change.clamp(-max_log_ratio, max_log_ratio).exp()
        clipped = (losses.detach() > -ratio * advantages) & target
        clamped = (change.abs() > max_log_ratio) & target
        more = {}
        if reference_logprob is not None:
            found = _kl_of_chunk(chunk, reference_logprob[rows], estimator, max_k3)
            loss = loss + kl_coefficient * found.sequence_kl[0] / normaliser
            more["policy/kl_avg"] = found.sequence_kl[0].detach()
            clamped |= (estimator == "k3") & (found.kl >= max_k3)
        return loss, {
            "policy/approxkl_avg": 0.5 * change.square().sum(),
            "policy/clipfrac_avg": clipped.to(ratio.dtype).sum(),
            "policy/entropy_avg": chunk.entropy.sum(),
            "policy/num_clamped": clamped.to(ratio.dtype).sum(),
            "val/ratio": (ratio * target).sum(),
            **more,
            **_token_metrics(chunk),
        }

    return loss_fn


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


def _token_metrics(chunk: TokenChunk) -> dict[str, Tensor]:
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
