"""The head's cases: what each implementation computes, its FLOPs, and that all agree."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign import fused_linear_dpo_loss, linear_logprob

BETA = 0.1


@dataclass(frozen=True)
class HeadCase:
    """Shapes of one head: T tokens, D hidden, V vocabulary, in 2B sequences of equal length."""

    name: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    num_pairs: int

    def flops(self, num_products: int) -> int:
        """FLOPs of `num_products` products of T x D x V."""
        return 2 * num_products * self.num_tokens * self.hidden_size * self.vocab_size


CPU_CASES = (
    HeadCase("t512_d1024_v32768", 512, 1024, 32768, 4),
    HeadCase("t500_d768_v50257", 500, 768, 50257, 2),
)
CUDA_CASES = (
    HeadCase("t4096_d4096_v128256", 4096, 4096, 128256, 8),
    HeadCase("t8192_d4096_v151936", 8192, 4096, 151936, 1),
)


@dataclass
class HeadInputs:
    """Tensors of one case, on the device."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)
    cu_seqlens: Tensor  # (2B + 1,)
    reference_logprob: Tensor  # (2B,)


def make_inputs(case: HeadCase, device: str, dtype: torch.dtype) -> HeadInputs:
    """Seeded inputs whose softmax is neither flat nor certain: logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.num_tokens, case.hidden_size, generator=generator)
    weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator)
    weight *= 3 / case.hidden_size**0.5
    targets = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator)
    num_sequences = 2 * case.num_pairs
    bounds = [case.num_tokens * i // num_sequences for i in range(num_sequences + 1)]
    lengths = torch.tensor(bounds).diff()
    return HeadInputs(
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(),
        targets=targets.to(device),
        cu_seqlens=torch.tensor(bounds),
        reference_logprob=(-15.0 * lengths).to(device),
    )


def eager_logprob(inputs: HeadInputs) -> Tensor:
    """What most people write: all logits, then a float32 log-softmax."""
    logits = (inputs.hidden @ inputs.weight.T).float()
    return logits.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]


def eager_dpo(inputs: HeadInputs) -> Tensor:
    """The DPO loss (arXiv 2305.18290, eq. 7) on `eager_logprob`."""
    logprob = eager_logprob(inputs)
    lengths = inputs.cu_seqlens.diff().tolist()
    sequence = torch.stack([part.sum() for part in logprob.split(lengths)])
    ratio = sequence - inputs.reference_logprob
    return -torch.nn.functional.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()


def fastalign_dpo(inputs: HeadInputs) -> Tensor:
    """The same loss by `fused_linear_dpo_loss`."""
    loss, _ = fused_linear_dpo_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.cu_seqlens,
        inputs.reference_logprob,
        beta=BETA,
    )
    return loss


def fastalign_logprob(inputs: HeadInputs) -> Tensor:
    """The same log-probs by `linear_logprob`."""
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.targets)
    assert isinstance(logprob, Tensor)
    return logprob


def products(inputs: HeadInputs) -> None:
    """The three bare matrix products of a head: logits, dHidden, dWeight."""
    with torch.no_grad():
        logits = inputs.hidden @ inputs.weight.T
        _ = logits @ inputs.weight
        _ = logits.T @ inputs.hidden


def forward_backward(function: Callable[[HeadInputs], Tensor], inputs: HeadInputs) -> Tensor:
    """One loss and its gradients in `hidden` and `weight`, which are then thrown away."""
    loss = function(inputs).sum()
    loss.backward()
    inputs.hidden.grad = inputs.weight.grad = None
    return loss.detach()


IMPLEMENTATIONS: dict[str, dict[str, Callable[[HeadInputs], Tensor]]] = {
    "dpo-loss": {"eager": eager_dpo, "fastalign": fastalign_dpo},
    "linear-logprob": {"eager": eager_logprob, "fastalign": fastalign_logprob},
}
