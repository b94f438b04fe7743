"""The distribution that tokens are drawn from, for samplers and for checks of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastalign.rollouts.sampler import SamplingParams

BLOCK = 256  # columns whose cumulative sum is computed to draw a token


def sampling_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Compute log-probs under temperature, top-k and top-p, applied in transformers' order.

    At temperature 0 they are the logits minus the largest one: 0 for the likeliest token.

    Returns:
        (R, V) float32, nats.
    """
    logits = _warped(logits, params)
    if params.temperature == 0:
        return logits - logits.amax(-1, keepdim=True)
    return logits.log_softmax(-1)


def _warped(logits: Tensor, params: SamplingParams) -> Tensor:
    logits = logits.float()
    if params.temperature == 0:
        return logits
    warpers: list[Any] = []
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits


def draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of each row, by inverting its cumulative distribution.

    A row's token depends on its own uniform number, not on the other rows. Sums of blocks find the
    block first: a cumulative sum of all columns would take longer than the rest together.

    Args:
        logits: (R, V).
        params: settings; at temperature 0 the likeliest token is taken.
        uniform: (R,) float64 in [0, 1).

    Returns:
        Tokens (R,) int64, and their log-probs (R,) float32, as `sampling_logprobs` has them.
    """
    logits = _warped(logits, params)
    if params.temperature == 0:
        best, token = logits.max(-1)
        return token, best - best  # 0, or NaN
    largest, num = logits.amax(-1, keepdim=True), logits.shape[1]
    weight = (logits - largest).exp_()
    whole = num - num % BLOCK
    blocks = weight[:, :whole].view(len(weight), whole // BLOCK, BLOCK)
    sums = torch.cat([blocks.sum(-1), weight[:, whole:].sum(-1, keepdim=True)], 1)
    total = sums.sum(-1, keepdim=True, dtype=torch.float64)
    block, target = _inverse(sums, uniform[:, None] * total)
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)
    columns.clamp_(max=num - 1)
    place, _ = _inverse(weight.gather(1, columns), target)
    token = columns.gather(1, place)
    logprob = logits.gather(1, token) - largest - total.log().to(logits.dtype)
    return token[:, 0], logprob[:, 0]


def _inverse(weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the cumulative sum (R, n) first exceeds a target (R, 1), and by how much less.

    That is a column (R, 1), whose weight is never 0, and the target less the columns before it.
    """
    cumulative = weight.cumsum(-1, dtype=torch.float64)
    below = cumulative[:, -1:] * (1 - torch.finfo(cumulative.dtype).eps)
    target = torch.minimum(target, below)  # rounding must not lead behind the last weight
    column = torch.searchsorted(cumulative, target, right=True)
    column.clamp_(max=weight.shape[1] - 1)  # of NaN, which the caller finds in the log-prob
    before = F.pad(cumulative, (1, 0)).gather(1, column)
    return column, target - before


@torch.no_grad()
def recompute_logprobs(
    model: Any, prompt_ids: list[int], response_ids: list[int], params: SamplingParams
) -> Tensor:
    """Compute the log-prob of each token of a response under the sampling distribution.

    The model, from `load_policy`, is in eval mode; `response_ids` are n tokens.

    Returns:
        (n,) float32, nats.
    """
    response = torch.tensor(response_ids, device=model.device)
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        logits_to_keep=len(response) + 1,
        use_cache=False,
    )
    logprob = sampling_logprobs(output.logits[0, :-1], params)
    return logprob.gather(1, response[:, None])[:, 0]
