"""The log-probs of preference pairs, of which a preference loss is a function."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogprobs:
    """Whole-response log-probs of B pairs; a length is a number of target tokens.

    Where `tie` is True neither answer is better: chosen and rejected are the first and the second.
    """

    policy_chosen_logprob: Tensor  # (B,)
    policy_rejected_logprob: Tensor  # (B,)
    reference_chosen_logprob: Tensor | None  # (B,)
    reference_rejected_logprob: Tensor | None  # (B,)
    chosen_length: Tensor  # (B,) int64
    rejected_length: Tensor  # (B,) int64
    tie: Tensor  # (B,) bool
    margin: Tensor | None = None  # (B,)

    def logprobs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `dpo`'s arguments: policy chosen and rejected, reference chosen and rejected.

        Raises:
            ValueError: if there is no reference.
        """
        if self.reference_chosen_logprob is None or self.reference_rejected_logprob is None:
            raise ValueError("reference_logprob: expected one, for this loss needs it, got None")
        return (
            self.policy_chosen_logprob,
            self.policy_rejected_logprob,
            self.reference_chosen_logprob,
            self.reference_rejected_logprob,
        )

    def implicit_rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return detached rewards (B,) of chosen and rejected.

        They are beta * (log policy - log reference), DPO's (arXiv 2305.18290, section 5); without a
        reference, beta * log policy.
        """
        chosen = self.policy_chosen_logprob.detach()
        rejected = self.policy_rejected_logprob.detach()
        if self.reference_chosen_logprob is not None:
            chosen = chosen - self.reference_chosen_logprob
        if self.reference_rejected_logprob is not None:
            rejected = rejected - self.reference_rejected_logprob
        return beta * chosen, beta * rejected

    def chosen_nll(self) -> Tensor:
        """Return the chosen responses' mean cross-entropy a token, (B,); 0 for ties.

        The term that RPO adds to DPO: Pang et al. (arXiv 2404.19733, eq. 1).
        """
        length = self.chosen_length.clamp(min=1).to(self.policy_chosen_logprob.dtype)
        return (-self.policy_chosen_logprob / length).masked_fill(self.tie, 0.0)

    @classmethod
    def from_responses(
        cls,
        policy_logprob: Tensor,  # (2B,) chosen, rejected, chosen, rejected, ...
        reference_logprob: Tensor | None,  # (2B,)
        length: Tensor,  # (2B,)
        tie: Tensor | None = None,  # (B,) bool
        margin: Tensor | None = None,  # (B,)
    ) -> "PairLogprobs":
        """Make pairs of responses in the order chosen, rejected, chosen, rejected, ..."""
        chosen, rejected = policy_logprob[0::2], policy_logprob[1::2]
        return cls(
            chosen,
            rejected,
            None if reference_logprob is None else reference_logprob[0::2],
            None if reference_logprob is None else reference_logprob[1::2],
            length[0::2],
            length[1::2],
            torch.zeros_like(chosen, dtype=torch.bool) if tie is None else tie,
            margin,
        )
