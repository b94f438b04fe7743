"""The language-model head of a causal model as a `LinearHead`."""

from typing import Any

import torch

from fastalign.models.architecture import backbone
from fastalign.models.lora import layer_adapter
from fastalign.ops import LinearHead

# Names of the factor of the logits in configurations, and whether it divides them.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LOGIT_SCALES = {"logit_scale": False, "lm_head_multiplier": False, "logits_scaling": True}


def lm_head(model: Any) -> LinearHead:
    """Read the head of a transformers causal model.

    Raises:
        ValueError: if the model has no output embeddings.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"{type(model).__name__} has no language-model head")
    config, scale = model.config.get_text_config(), 1.0
    for name, divides in LOGIT_SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale = scale / value if divides else scale * value
    return LinearHead(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        softcap=next((c for name in SOFTCAPS if (c := getattr(config, name, None))), None),
        logit_scale=float(scale),
        lora=layer_adapter(embeddings),
    )


@torch.no_grad()
def check_head(model: Any) -> None:
    """Check on two tokens that the head gives the logits that the model gives.

    Raises:
        ValueError: if the model transforms its logits in a way that `LinearHead` does not have, or
            they are not finite.
    """
    input_ids, hidden = torch.tensor([[0, 1]], device=model.device), []
    # both of one forward, so that dropout changes nothing
    with backbone(model).register_forward_hook(
        lambda _, __, output: hidden.append(output.last_hidden_state)
    ):
        theirs = model(input_ids, use_cache=False).logits.float()
        if not hidden:  # OPT calls its decoder by another way than its own backbone
            backbone(model)(input_ids, use_cache=False)
    head = lm_head(model)
    ours = head.logits(hidden[0].to(head.weight.dtype)).float()
    if not bool(theirs.isfinite().all()):
        raise ValueError(
            f"model.path: the logits of {model.name_or_path!r} are not finite: its weights or its "
            "config.json are damaged"
        )
    scale = theirs.abs().max().clamp(min=1e-6)
    error = float((ours - theirs).abs().max() / scale)
    if not error < 2e-2:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits in a way that fastalign does not "
            f"know (relative difference {error:.1e}); it cannot be trained exactly"
        )
