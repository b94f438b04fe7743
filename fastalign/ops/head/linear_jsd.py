"""`linear_jsd`: two heads to the generalised Jensen-Shannon divergence of their distributions.

Legend: T rows, V vocabulary, D and E hidden sizes of student and teacher.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastalign.ops.head.linear_head import LinearHead, as_linear_head

DEFAULT_BYTES = 2**28  # of one chunk's logits of both heads


def generalised_jsd(
    logprob: Tensor,  # (T, V)
    teacher_logprob: Tensor,  # (T, V)
    *,
    beta: float = 0.5,
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence of each row, (T,), in nats.

    beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, with p the student's and q
    the teacher's distribution: Agarwal et al. (2023, GKD, arXiv 2306.13649, section 2). At beta 0
    it is KL(q || p), distillation's forward KL, and at beta 1 KL(p || q), as in TRL and Liger.

    Args:
        logprob: student's log-probs of every token.
        teacher_logprob: teacher's; a gradient flows only if they require one.
        beta: weight of the teacher, in [0, 1].

    Raises:
        ValueError: if shapes differ, or beta is out of its range.
    """
    if logprob.shape != teacher_logprob.shape:
        raise ValueError(
            f"teacher_logprob: expected {tuple(logprob.shape)} as logprob has, got "
            f"{tuple(teacher_logprob.shape)}"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if beta == 0:
        return _kl(teacher_logprob, logprob)
    if beta == 1:
        return _kl(logprob, teacher_logprob)
    mixture = torch.logaddexp(logprob + math.log1p(-beta), teacher_logprob + math.log(beta))
    return beta * _kl(teacher_logprob, mixture) + (1 - beta) * _kl(logprob, mixture)


def _kl(logprob: Tensor, other: Tensor) -> Tensor:
    return (logprob.exp() * (logprob - other)).sum(-1)


def linear_jsd(
    hidden: Tensor,  # (T, D)
    weight: Tensor | LinearHead,  # (V, D)
    teacher_hidden: Tensor,  # (T, E)
    teacher_weight: Tensor | LinearHead,  # (V, E)
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence (T,) of two heads, a chunk at a time.

    The same as these lines, without their (T, V) tensors:

        log_p = log_softmax(head(hidden).float() / temperature, -1)
        log_q = log_softmax(teacher_head(teacher_hidden).float() / temperature, -1)
        jsd = generalised_jsd(log_p, log_q, beta=beta)

    Differentiable in the student's hidden states and head; the teacher gets no gradient. PyTorch
    computes it on any device: no kernel of this package reads its logits. Each chunk's logits are
    computed again in the backward, so 8 products for the student and 4 for the teacher. The
    divergence of one direction is `linear_kl`'s, in fewer passes.

    Args:
        hidden: (T, D) student's hidden states, without rows that do not count.
        weight: (V, D) weight of the student's head, or a `LinearHead` with bias, softcap, scale or
            adapter.
        teacher_hidden: (T, E) teacher's hidden states of the same rows.
        teacher_weight: (V, E) weight of the teacher's head, or a `LinearHead`.
        beta: as in `generalised_jsd`.
        temperature: divisor of both logits, above 0.
        max_buffer_bytes: most memory for the logits of both heads at a time; None: 256 MiB.

    Returns:
        (T,) float32, or float64 where hidden states are.

    Raises:
        ValueError: if a shape or number is wrong, or a head holds a part of the vocabulary.
    """
    student, teacher = as_linear_head(weight), as_linear_head(teacher_weight)
    _check(hidden, student, teacher_hidden, teacher)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def logprobs(head: LinearHead, rows: Tensor) -> Tensor:
        return (head.logits(rows).to(wide) / temperature).log_softmax(-1)

    def of_rows(rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            known = logprobs(teacher, teacher_rows)
        return generalised_jsd(logprobs(student, rows), known, beta=beta)

    most = DEFAULT_BYTES if max_buffer_bytes is None else max_buffer_bytes
    size = max(1, most // (4 * wide.itemsize * len(student.weight)))
    parts = [
        checkpoint(of_rows, *rows, use_reentrant=False)
        for rows in zip(torch.split(hidden, size), torch.split(teacher_hidden, size), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide)


def _check(
    hidden: Tensor, student: LinearHead, teacher_hidden: Tensor, teacher: LinearHead
) -> None:
    if hidden.ndim != 2 or teacher_hidden.shape[:1] != hidden.shape[:1]:
        raise ValueError(
            f"teacher_hidden: expected as many rows as hidden {tuple(hidden.shape)}, got "
            f"{tuple(teacher_hidden.shape)}"
        )
    if len(teacher.weight) != len(student.weight):
        raise ValueError(
            f"teacher_weight: expected the student's {len(student.weight)} tokens, got "
            f"{len(teacher.weight)}"
        )
    for name, head in (("weight", student), ("teacher_weight", teacher)):
        if head.shard is not None:
            raise ValueError(f"{name}: linear_jsd expected a head without shard, got one with it")
