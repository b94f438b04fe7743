"""The pass over two heads' tiles in PyTorch, strip by strip so that a strip stays in the cache.

Float64 for float64 tiles.

Legend: C tile rows, S strip rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastalign.ops.head.head_tile import Tile
from fastalign.ops.head.head_tile.torch_strips import (
    LOWEST_SHIFTED_LOGIT,
    shifted_logits,
    strips,
)
from fastalign.ops.head.kl_tile.statistics import PairStatistics, PairUpstream
from fastalign.ops.target_columns import target_columns

# A larger difference of two shifted logits means that one is a banned token's.
BANNED_DIFFERENCE = -0.5 * LOWEST_SHIFTED_LOGIT


def read(
    tile: Tile,
    over_reference: bool,
    brackets: Tensor | None,
    gradient: Tensor | None,
    upstream: PairUpstream | None,
    scratch: Tensor,
) -> PairStatistics:
    """See `kl_tile.read_pair`."""
    parts = []
    for start, stop in strips(tile.products.shape[1], scratch):
        strip = _Strip(tile.rows(start, stop), over_reference, scratch[:, : stop - start])
        if brackets is not None:
            strip.write_brackets(brackets[:, start:stop])
        if gradient is not None:
            assert upstream is not None
            strip.write_gradient(gradient[start:stop], upstream.rows(start, stop))
        parts.append(strip.statistics())
    return PairStatistics.joined(parts, tile.products)


class _Strip:
    """A strip's statistics, each (S, 1); what its gradients are made from is in the scratch."""

    def __init__(self, tile: Tile, over_reference: bool, scratch: Tensor) -> None:
        products, transform = tile.products, tile.transform
        target, factor = target_columns(
            tile.targets, tile.ignored, products.shape[2], products.dtype
        )
        self._products, self._transform = products, transform
        self._target, self._factor = target, factor
        self._ignored, self._over_reference = tile.ignored[:, None], over_reference
        shifted, difference, p, q = scratch
        shifted_logits(products[0], transform, out=shifted)
        shifted_logits(products[1], transform, out=difference)
        torch.exp(shifted, out=p)
        torch.exp(difference, out=q)
        self._total, self._reference_total = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
        self._log_total = self._total.log()
        self._logprob = shifted.gather(1, target) * factor - self._log_total
        reference_logit = difference.gather(1, target) * factor
        self._reference_logprob = reference_logit - self._reference_total.log()
        shifted.clamp_(min=LOWEST_SHIFTED_LOGIT)
        difference.clamp_(min=LOWEST_SHIFTED_LOGIT).neg_().add_(shifted)
        # reuse the reference's products as scratch: they have been consumed
        product = torch.mul(p, shifted, out=products[1])
        self._entropy = self._log_total - product.sum(1, keepdim=True) / self._total
        if over_reference:
            difference.neg_()
        product = torch.mul(q if over_reference else p, difference, out=products[1])
        own, other = self._total, self._reference_total
        if over_reference:
            own, other = other, own
        self._mean = product.sum(1, keepdim=True) / own
        self._kl = (self._mean - (own / other).log()).clamp_(min=0.0)
        self._infinite = difference.amax(1, keepdim=True) > BANNED_DIFFERENCE
        self._shifted: Tensor = shifted
        self._difference: Tensor = difference
        self._p: Tensor = p
        self._q: Tensor = q

    def statistics(self) -> PairStatistics:
        """Return the statistics, zero where ignored."""
        kl = self._kl.masked_fill(self._infinite, torch.inf)
        # rounding may leave a sure row a hair below zero
        entropy = self._entropy.clamp(min=0.0)
        found = (self._logprob, self._reference_logprob, entropy, kl)
        return PairStatistics(
            *(value.masked_fill(self._ignored, 0.0).squeeze(1) for value in found)
        )

    def _kl_bracket(self, scale: Tensor | float) -> Tensor:
        """Return scale times the KL's derivative by z; NaN where it is infinite and scale not 0."""
        factor: Tensor = scale / self._total
        factor = factor.masked_fill(self._infinite & (factor != 0), torch.nan)
        if self._over_reference:
            # in this order it is exactly zero where the two sides are the same
            ratio = self._total / self._reference_total
            bracket = self._q.mul_(-ratio).add_(self._p)
        else:
            bracket = self._difference.sub_(self._mean).mul_(self._p)
        return bracket.mul_(factor)

    def _tanh_slope(self) -> Tensor | None:
        """Return the tanh's own factor of the derivative of z by the product; None: no softcap."""
        u = self._products[0]
        return None if self._transform.softcap is None else u.square_().neg_().add_(1.0)

    def write_brackets(self, brackets: Tensor) -> None:
        """Write the derivatives of log-prob and KL by the products."""
        slope = self._transform.slope(self._p)
        of_kl = self._kl_bracket(slope)
        of_logprob = self._p.mul_(-slope * self._factor / self._total)
        of_logprob.scatter_(1, self._target, -torch.expm1(self._logprob) * slope)
        tanh_slope = self._tanh_slope()
        for value in (of_logprob, of_kl):
            if tanh_slope is not None:
                value.mul_(tanh_slope)
            value.masked_fill_(self._ignored, 0.0)
        # only now, after the last reading of the products: `brackets` may be their memory
        brackets[0].copy_(of_logprob)
        brackets[1].copy_(of_kl)

    def write_gradient(self, gradient: Tensor, upstream: PairUpstream) -> None:
        """Write the derivative by the products of upstream's combination of the statistics."""
        slope = self._transform.slope(self._p)
        g, e, k = (values[:, None].to(self._p.dtype) * slope for values in upstream)
        g = g * self._factor
        result = self._kl_bracket(k)
        p, log_p_plus_entropy = self._p, self._shifted.add_(self._entropy - self._log_total)
        p.div_(self._total)
        # 1 - p from the log-prob: exact where p is near 1
        at_target = result.gather(1, self._target) - torch.expm1(self._logprob) * g
        at_target -= e * p.gather(1, self._target) * log_p_plus_entropy.gather(1, self._target)
        # d logprob / d z_v = 1[v = y] - p_v, and d entropy / d z_v = -p_v (log p_v + entropy)
        result.addcmul_(log_p_plus_entropy.mul_(-e).sub_(g), p)
        result.scatter_(1, self._target, at_target)
        tanh_slope = self._tanh_slope()
        if tanh_slope is not None:
            result.mul_(tanh_slope)
        gradient.copy_(result.masked_fill_(self._ignored, 0.0))
