"""The pass over a tile in PyTorch, strip by strip so that a strip stays in the cache.

It is also the definition beside which the kernels are tested: float64 for a float64 tile.

Legend: C tile rows, S strip rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.transform import HeadTransform, RowStatistics

# A strip and its two scratch copies should stay in a CPU core's cache; a GPU wants few launches.
STRIP_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}
# Stands for -inf where 0 * -inf would be NaN: exp of it is exactly 0 in every dtype used here.
LOWEST_SHIFTED_LOGIT = -1e30


def strip_rows(num_columns: int, num_rows: int, device_type: str) -> int:
    """How many rows one strip of a tile has: at most an eighth of the tile, to save memory."""
    fitting = STRIP_ELEMENTS.get(device_type, STRIP_ELEMENTS["cuda"]) // max(num_columns, 1)
    return max(1, min(fitting, num_rows // 8))


def read(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    gradient: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> RowStatistics:
    """See `head_tile.read_tile`."""
    parts = []
    for start in range(0, tile.shape[0], scratch.shape[1]):
        rows = slice(start, min(start + scratch.shape[1], tile.shape[0]))
        parts.append(
            _read_strip(
                tile[rows],
                targets[rows, None],
                ignored[rows, None],
                transform.rows(rows.start, rows.stop),
                scratch[:, : rows.stop - start],
                None if gradient is None else gradient[rows],
                None if grad_logprob is None else grad_logprob[rows, None],
                None if grad_entropy is None else grad_entropy[rows, None],
            )
        )
    if not parts:
        empty = tile.new_zeros(0)
        return RowStatistics(empty, empty, empty.bool())
    return RowStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def shifted_logits(u: Tensor, transform: HeadTransform, out: Tensor) -> None:
    """Turns the strip u into the tanh, when there is a softcap, and out into z - max z."""
    if transform.softcap is not None:
        u.mul_(transform.logit_scale / transform.softcap).tanh_()
    torch.sub(u, u.amax(dim=1, keepdim=True), out=out)
    gain = transform.gain(u)
    if not (isinstance(gain, float) and gain == 1.0):
        out.mul_(gain)


def _read_strip(
    u: Tensor,
    target: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    gradient: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shifted, exponential = scratch[0], scratch[1]
    shifted_logits(u, transform, out=shifted)
    target_logit = shifted.gather(1, target)
    torch.exp(shifted, out=exponential)
    total = exponential.sum(dim=1, keepdim=True)
    log_sum = total.log()
    logprob = target_logit - log_sum
    shifted.clamp_(min=LOWEST_SHIFTED_LOGIT).mul_(exponential)
    entropy = log_sum - shifted.sum(dim=1, keepdim=True) / total
    if gradient is not None:
        softmax = StripSoftmax(total, log_sum, logprob, entropy)
        upstream = (grad_logprob, grad_entropy)
        write_gradient(u, target, ignored, transform, scratch, softmax, gradient, *upstream)
    return (
        logprob.masked_fill_(ignored, 0.0).squeeze(1),
        # rounding may leave a sure row a hair below zero
        entropy.clamp_(min=0.0).masked_fill_(ignored, 0.0).squeeze(1),
        (target_logit.ge(0.0) & ~ignored).squeeze(1),
    )


@dataclass(frozen=True)
class StripSoftmax:
    """The softmax of a strip's rows, all (S, 1); `total` belongs to the exponentials in scratch."""

    total: Tensor
    log_total: Tensor
    logprob: Tensor
    entropy: Tensor


def write_gradient(
    u: Tensor,
    target: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    scratch: Tensor,
    softmax: StripSoftmax,
    gradient: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    has_target: Tensor | None = None,
) -> None:
    """Writes a strip's gradient, and destroys u, which with a softcap is the tanh.

    scratch[1] holds e = exp(z - maximum); scratch[0] holds e (z - maximum), where an entropy's
    gradient asks for it. `has_target` (S, 1): whether the target is among these columns.
    """
    weighted, exponential = scratch[0], scratch[1]
    slope = transform.slope(u)
    g = slope if grad_logprob is None else slope * grad_logprob.to(u.dtype)
    # 1 - p from the log-prob: exact where p is near 1
    at_target = -torch.expm1(softmax.logprob) * g
    if grad_entropy is None:
        exponential.mul_(-g / softmax.total)
    else:
        # d entropy / d z_v = -p_v (log p_v + entropy), and e_v log p_v is in `weighted`
        e = slope * grad_entropy.to(u.dtype)
        rest = e * (softmax.entropy - softmax.log_total) + g
        log_p = softmax.logprob.clamp(min=LOWEST_SHIFTED_LOGIT)
        at_target -= e * softmax.logprob.exp() * (log_p + softmax.entropy)
        exponential.mul_(-rest / softmax.total)
        exponential.sub_(weighted.mul_(e / softmax.total))
    if has_target is not None:
        at_target = torch.where(has_target, at_target, exponential.gather(1, target))
    exponential.scatter_(1, target, at_target)
    if transform.softcap is not None:
        exponential.mul_(u.square_().neg_().add_(1.0))
    gradient.copy_(exponential.masked_fill_(ignored, 0.0))
