"""Cases and implementations of the head benchmarks, with their FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastalign import (
    fused_linear_dpo_loss,
    fused_linear_preference_loss,
    linear_logprob,
)
from fastalign.losses import formula, orpo
from fastalign.ops.float32_products import onednn_product, onednn_takes

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
        """Return the FLOPs of `num_products` products of T x D x V."""
        return 2 * num_products * self.num_tokens * self.hidden_size * self.vocab_size


# Shapes of real models' heads, with a smaller T for CPUs.
CASES = {
    case.name: case
    for case in (
        HeadCase("smollm2-135m", 4096, 576, 49152, 8),
        HeadCase("smollm2-135m-one-pair", 8192, 576, 49152, 1),
        HeadCase("qwen2.5-0.5b-t512", 512, 896, 151936, 4),
        HeadCase("qwen2.5-0.5b", 8192, 896, 151936, 8),
        HeadCase("gemma-2-2b", 8192, 2304, 256000, 8),
        HeadCase("llama-3-8b", 4096, 4096, 128256, 8),
        HeadCase("qwen3-8b", 8192, 4096, 151936, 8),
        HeadCase("t512_d1024_v32768", 512, 1024, 32768, 4),
        HeadCase("t500_d768_v50257", 500, 768, 50257, 2),
        HeadCase("t2048_d576_v49152", 2048, 576, 49152, 4),
        HeadCase("t64_d576_v49152", 64, 576, 49152, 1),
        HeadCase("t512_d2048_v128256", 512, 2048, 128256, 1),
        HeadCase("t8192_d256_v32000", 8192, 256, 32000, 8),
    )
}
# The cases of a comparison and a device if none is named.
DEFAULT_CASES = {
    ("head", "cpu"): ("smollm2-135m", "qwen2.5-0.5b-t512", "smollm2-135m-one-pair"),
    ("head", "cuda"): ("smollm2-135m", "qwen2.5-0.5b", "gemma-2-2b", "llama-3-8b", "qwen3-8b"),
    ("dpo-loss", "cpu"): ("t512_d1024_v32768", "t500_d768_v50257"),
    ("dpo-loss", "cuda"): ("llama-3-8b",),
    ("orpo", "cpu"): ("smollm2-135m",),
    ("orpo", "cuda"): ("llama-3-8b",),
    ("linear-logprob", "cpu"): ("t512_d1024_v32768", "t500_d768_v50257"),
    ("linear-logprob", "cuda"): ("llama-3-8b",),
}


@dataclass
class HeadInputs:
    """Tensors of one case, on the device."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)
    cu_seqlens: Tensor  # (2B + 1,)
    lengths: tuple[int, ...]  # (2B,), on the host
    reference_logprob: Tensor  # (2B,), zeros, which every peer supports
    outputs: tuple[Tensor, Tensor, Tensor] | None = None  # buffers of the bare products


def make_inputs(case: HeadCase, device: str, dtype: torch.dtype) -> HeadInputs:
    """Return seeded inputs whose softmax is neither flat nor certain: logits of deviation 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.num_tokens, case.hidden_size, generator=generator)
    weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator)
    weight *= 3 / case.hidden_size**0.5
    targets = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator)
    num_sequences = 2 * case.num_pairs
    bounds = [case.num_tokens * i // num_sequences for i in range(num_sequences + 1)]
    return HeadInputs(
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(),
        targets=targets.to(device),
        cu_seqlens=torch.tensor(bounds),
        lengths=tuple(stop - start for start, stop in pairwise(bounds)),
        reference_logprob=torch.zeros(num_sequences, device=device),
    )


def eager_logprob(inputs: HeadInputs) -> Tensor:
    """Return log-probs the usual way: all logits, then a float32 log-softmax."""
    logits = (inputs.hidden @ inputs.weight.T).float()
    return logits.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]


def dpo_of(logprob: Tensor, inputs: HeadInputs) -> Tensor:
    """Return the DPO loss (arXiv 2305.18290, eq. 7) of per-token log-probs."""
    # float64 for all implementations: rounding of float32 sums would exceed their differences
    sums = [part.sum(dtype=torch.float64) for part in logprob.split(inputs.lengths)]
    ratio = torch.stack(sums) - inputs.reference_logprob
    return -torch.nn.functional.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean().float()


def eager_dpo(inputs: HeadInputs) -> Tensor:
    """Return the DPO loss on `eager_logprob`."""
    return dpo_of(eager_logprob(inputs), inputs)


def fastalign_dpo(inputs: HeadInputs) -> Tensor:
    """Return the DPO loss by `fused_linear_dpo_loss`."""
    loss, _ = fused_linear_dpo_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.cu_seqlens,
        inputs.reference_logprob,
        beta=BETA,
    )
    return loss


def eager_orpo(inputs: HeadInputs) -> Tensor:
    """Return the ORPO loss (arXiv 2403.07691, eq. 6 and 7) on `eager_logprob`."""
    sums = torch.stack([part.sum() for part in eager_logprob(inputs).split(inputs.lengths)])
    lengths = torch.tensor(inputs.lengths, device=sums.device)
    return orpo(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2], beta=BETA).mean()


def fastalign_orpo(inputs: HeadInputs) -> Tensor:
    """Return the ORPO loss by `fused_linear_preference_loss`."""
    loss, _ = fused_linear_preference_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.cu_seqlens,
        formula(orpo, beta=BETA),
    )
    return loss


def fastalign_logprob(inputs: HeadInputs) -> Tensor:
    """Return log-probs by `linear_logprob`."""
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.targets)
    assert isinstance(logprob, Tensor)
    return logprob


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> None:
    """Compute left @ right by the faster of PyTorch's libraries, of which one knows no `out`."""
    if onednn_takes(left, right):
        onednn_product(left, right.t())
    else:
        torch.mm(left, right, out=out)


def products(inputs: HeadInputs, num_products: int = 3) -> None:
    """Compute the bare matrix products of a head (logits, dHidden, dWeight) into fixed buffers."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    if inputs.outputs is None:
        logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
        inputs.outputs = (logits, torch.zeros_like(hidden), torch.zeros_like(weight))
    logits, of_hidden, of_weight = inputs.outputs
    multiply(hidden, weight.t(), logits)
    if num_products > 1:
        multiply(logits, weight, of_hidden)
    if num_products > 2:
        multiply(logits.t(), hidden, of_weight)


def forward_only(function: Callable[[HeadInputs], Tensor], inputs: HeadInputs) -> Tensor:
    """Return the loss without gradients."""
    with torch.no_grad():
        return function(inputs).sum()


def forward(function: Callable[[HeadInputs], Tensor], inputs: HeadInputs) -> Tensor:
    """Return the loss with its graph."""
    return function(inputs).sum()


def backward(loss: Tensor, inputs: HeadInputs) -> None:
    """Compute the gradients of `forward`'s loss and discard them."""
    loss.backward()
    inputs.hidden.grad = inputs.weight.grad = None


def forward_backward(function: Callable[[HeadInputs], Tensor], inputs: HeadInputs) -> Tensor:
    """Compute a loss and its gradients with respect to `hidden` and an unfrozen `weight`."""
    loss = forward(function, inputs)
    backward(loss, inputs)
    return loss.detach()


IMPLEMENTATIONS: dict[str, dict[str, Callable[[HeadInputs], Tensor]]] = {
    "dpo-loss": {"eager": eager_dpo, "fastalign": fastalign_dpo},
    "linear-logprob": {"eager": eager_logprob, "fastalign": fastalign_logprob},
    "head": {"eager": eager_dpo, "fastalign": fastalign_dpo},
    "orpo": {"eager": eager_orpo, "fastalign": fastalign_orpo},
}
