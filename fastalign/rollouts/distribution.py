"""The distribution that tokens are drawn from, for samplers and for checks of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastalign.rollouts.sampler import SamplingParams


def sampling_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Compute log-probs under temperature, top-k and top-p, applied in transformers' order.

    At temperature 0 they are the logits minus the largest one: 0 for the likeliest token.

    Returns:
        (R, V) float32, nats.
    """
    logits = logits.float()
    if params.temperature == 0:
        return logits - logits.amax(-1, keepdim=True)
    warpers: list[Any] = []
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits.log_softmax(-1)


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
