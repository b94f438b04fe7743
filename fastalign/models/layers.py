"""Decoder layers: what the last one leaves out, compilation, offloading."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastalign.models.architecture import backbone
from fastalign.ranks.parallel import decoder_layers


def skip_unread_tokens(model: Any) -> list[RemovableHandle]:
    """Make the last layer's MLP compute only the tokens whose hidden states are read.

    Those are in the `read_index` of the plan that the layer is given. The other tokens, a prompt's
    but the last, end with their keys and values in this layer; the MLP's output for them is 0.
    Compiled layers compute all tokens. Whether this is exact, a model's verdict says.

    Returns:
        Handles that remove it; none if the last layer has no part of the name `mlp`.
    """
    try:
        last: Any = decoder_layers(model.get_decoder(), "model.path")[-1]
    except ValueError:
        return []
    if not isinstance(getattr(last, "mlp", None), nn.Module):
        return []
    hooks = _ReadTokens()
    return [
        last.register_forward_pre_hook(hooks.of_layer, with_kwargs=True),
        last.mlp.register_forward_pre_hook(hooks.before_mlp),
        last.mlp.register_forward_hook(hooks.after_mlp),
    ]


class _ReadTokens:
    """The hooks of `skip_unread_tokens`; a copy of the model has its own.

    Attributes:
        index: (K,) int64, the tokens that the present forward reads; None: all.
        shape: shape of the MLP's input in this forward.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.shape = torch.Size()

    def of_layer(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        plan = options.get("fastalign_plan")
        self.index = None if plan is None or torch.compiler.is_compiling() else plan.read_index

    def before_mlp(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.index is None:
            return None
        self.shape = inputs[0].shape
        return (inputs[0].index_select(1, self.index),)

    def after_mlp(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.index is None:
            return None
        return output.new_zeros(self.shape).index_copy(1, self.index, output)


def compile_layers(model: Any, *, backend: str = "inductor") -> None:
    """Compile each decoder layer in place, so that layers of one kind compile once.

    Parameters keep their names. The number of tokens is symbolic, so batches of different sizes
    run one program. Shared-prefix attention stays outside of the program; embeddings, the final
    norm and the head are not compiled.

    Raises:
        ValueError: if the model has no layers that transformers marks as such, or there is no C++
            compiler for a model on a CPU.
    """
    layers = decoder_layers(model, "train.compile")
    compiler = os.environ.get("CXX", "g++")
    if backend == "inductor" and model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"train.compile: on a CPU it needs a C++ compiler; {compiler} is not there"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def find_offload(setting: str) -> Callable[..., Any]:
    """Return Accelerate's `cpu_offload`; raise ValueError, for `setting`, if it is not there."""
    try:
        from accelerate import cpu_offload
    except ImportError as error:
        raise ValueError(f"{setting} needs accelerate: pip install 'fastalign[offload]'") from error
    offload: Callable[..., Any] = cpu_offload
    return offload


def offload_layers(model: Any, device: torch.device) -> None:
    """Make a model in host memory compute on `device`, with one layer's weights there at a time.

    The head's weight stays on the device, since log-probs are computed from it outside of any
    layer. For inference only; whatever needs all weights at once (a fingerprint, saving) has to
    come before.
    """
    offload = find_offload("offloading")
    if device.type == "cuda":  # pinned memory is copied several times as fast
        for parameter in model.parameters():
            parameter.data = parameter.data.pin_memory()
    layers = sorted(model._no_split_modules or [])
    offload(backbone(model), device, preload_module_classes=layers)
    model.get_output_embeddings().to(device)
