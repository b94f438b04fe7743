"""The load-balancing loss of a mixture of experts' router, where its configuration asks for it.

It is transformers' own function (Switch Transformer, arXiv 2101.03961, equations 4 to 6) of the
router's logits in all layers of a micro-batch's forward.
"""

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.models.architecture import backbone

ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def router_coefficient(model: Any) -> float:
    """Return what the router's loss of a causal model is multiplied by; 0: there is none."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False) or model.get_output_embeddings() is None:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def check_router(model: Any, path: str) -> None:
    """Raise ValueError if a model asks for its router's loss and transformers has none for it."""
    coefficient, function = router_coefficient(model), _loss_function(model)
    if coefficient and (function is None or list(signature(function).parameters) != ARGUMENTS):
        raise ValueError(
            f"model.path: config.json of {path!r} asks for the router's auxiliary loss "
            f"(output_router_logits true, router_aux_loss_coef {coefficient}), which is not known "
            f"of {type(model).__name__}; expected output_router_logits false, under which the "
            "router is trained by the tokens' loss alone"
        )


def add_router_loss(
    model: Any,
    batch: PackedBatch,
    share: float,
    compute_loss: Callable[[], tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's loss and metrics, and add `share` of the router's loss to the loss.

    `compute_loss` runs the model forward once. A prompt that responses share counts once for each,
    so that the result does not depend on the packing.
    """
    coefficient = router_coefficient(model)
    if not coefficient:
        return compute_loss()
    found: list[Tensor] = []

    def after(_: Any, __: Any, options: dict[str, Any], output: Any) -> None:
        mask = options["attention_mask"]
        weights = mask if mask.dim() == 2 else token_weights(batch)[None]
        num_experts, num_used = model.num_experts, model.num_experts_per_tok
        of_loss: Any = _loss_function(model)
        found.append(of_loss(output.router_logits, num_experts, num_used, weights))

    with backbone(model).register_forward_hook(after, with_kwargs=True):
        loss, sums = compute_loss()
    (router_loss,) = found
    whole = loss + coefficient * share * router_loss.to(loss.device)
    return whole, sums | {"router_loss": share * router_loss.detach()}


def token_weights(batch: PackedBatch) -> Tensor:
    """Return for each packed token (T,) float32 the number of responses whose sequence has it."""
    weights = [0.0] * batch.num_tokens
    layout = batch.layout
    for (start, stop), prompt in zip(layout.response_bounds, layout.response_prompt, strict=True):
        weights[start:stop] = [1.0] * (stop - start)
        for place in range(*layout.prompt_bounds[prompt]):
            weights[place] += 1.0
    return torch.tensor(weights, device=batch.input_ids.device)


def _loss_function(model: Any) -> Callable[..., Tensor] | None:
    if not hasattr(model, "num_experts"):
        return None
    module = sys.modules[type(model).__module__]
    found: Callable[..., Tensor] | None = getattr(module, "load_balancing_loss_func", None)
    return found
