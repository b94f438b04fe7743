"""The peers of the head benchmark, which compute the same loss from the same inputs.

A peer is a function that returns its implementation, and raises ImportError or ValueError with the
reason if it cannot run. Reference log-probs are zero and sequences equally long, since not every
peer supports others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import BETA, HeadInputs, dpo_of, eager_dpo

Implementation = Callable[[HeadInputs], Tensor]
TORCH_CHUNK_ROWS = 512


def torch_compile(device: str) -> Implementation:
    """Return the eager loss under torch.compile."""
    compiled: Implementation = torch.compile(eager_dpo, dynamic=False, fullgraph=True)
    return compiled


def torch_linear_cross_entropy(device: str) -> Implementation:
    """Return torch's linear_cross_entropy in chunks; its `auto` takes 8 rows on a CPU."""
    # Imports, so that a torch without these is a peer that is missing.
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions(
        batch_chunk_size=TORCH_CHUNK_ROWS, chunking_method=None, acc_policy="accurate"
    )

    def loss(inputs: HeadInputs) -> Tensor:
        negative = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, reduction="none", options=options
        )
        return dpo_of(-negative.float(), inputs)

    return loss


def trl(device: str) -> Implementation:
    """Return TRL's fused head as its DPO trainer calls it, without the optional entropy."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(inputs: HeadInputs) -> Tensor:
        logprob, *_ = ChunkedLogProbFunction.apply(
            inputs.hidden,
            inputs.weight,
            None,
            inputs.targets,
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            (),
        )
        return dpo_of(logprob, inputs)

    return loss


def liger_dpo(device: str) -> Implementation:
    """Return Liger's fused DPO loss, whose rows are (chosen..., rejected...) of equal length."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return _liger(LigerFusedLinearDPOLoss(use_ref_model=False))


def liger_orpo(device: str) -> Implementation:
    """Return Liger's fused ORPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    return _liger(LigerFusedLinearORPOLoss(beta=BETA))


def _liger(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Implementation:
    def loss(inputs: HeadInputs) -> Tensor:
        num_sequences = inputs.cu_seqlens.numel() - 1
        if inputs.targets.numel() % num_sequences:
            raise ValueError("its sequences must be equally long")

        def stacked(value: Tensor) -> Tensor:
            value = value.unflatten(0, (num_sequences, -1))
            return torch.cat([value[0::2], value[1::2]])

        result = function(inputs.weight, stacked(inputs.hidden), stacked(inputs.targets))
        return result[0] if isinstance(result, tuple) else result

    return loss


def cut_cross_entropy(device: str) -> Implementation:
    """Return Apple's cut cross-entropy on CUDA, exact (without its gradient filter)."""
    if device != "cuda":
        raise ValueError("it has kernels for CUDA only")
    from cut_cross_entropy import linear_cross_entropy

    def loss(inputs: HeadInputs) -> Tensor:
        negative = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, reduction="none", impl="cce_exact"
        )
        return dpo_of(-negative.float(), inputs)

    return loss


# By comparison.
PEERS: dict[str, dict[str, Callable[[str], Implementation]]] = {
    "head": {
        "torch.compile": torch_compile,
        "torch lce": torch_linear_cross_entropy,
        "trl": trl,
        "liger": liger_dpo,
        "cce": cut_cross_entropy,
    },
    "orpo": {"liger": liger_orpo},
}


def usable_peers(
    comparison: str, device: str, wanted: Sequence[str] = ()
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the wanted peers (all if none is named) that can run here, and why others cannot."""
    usable, reasons = {}, {}
    known = PEERS.get(comparison, {})
    for name in wanted or known:
        try:
            usable[name] = known[name](device)
        except (ImportError, ValueError) as error:
            reasons[name] = str(error).splitlines()[0]
    return usable, reasons
