"""Low-rank adapters on a frozen causal or reward model, through peft.

A model with an adapter stays a model of transformers; its linear layers are peft's. A reward
model's head is trained whole beside its adapter.
"""

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastalign.models.architecture import tower_parameters
from fastalign.models.low_bit import dense_layer, is_quantised
from fastalign.ops import LoraWeights
from fastalign.ops.float32_products import Linear

ADAPTER = "default"  # peft's own name for the only adapter
START = "fastalign_start"  # a frozen copy of the adapter that training goes on with
ALL_LINEAR = "all-linear"
REWARD_TASK = "SEQ_CLS"  # peft's `task_type` of a sequence classifier's adapter
# Names of layers under which transformers 4 kept single experts. On a mixture of experts peft takes
# such a target for the fused ones, so that layers of that name are targeted by their parameter.
OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def require_peft(what: str) -> None:
    """Raise ValueError, which begins with `what` needs it, if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(f"{what} needs peft: pip install 'fastalign[lora]'") from None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence three warnings of peft that do not apply here.

    They concern transposed layers, whose orientation peft detects, tied heads, which are untied
    here before a merge, and the rank and alpha that transformers sets for fused experts, which have
    them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern", RuntimeWarning)
        yield


def reward_head(model: Any) -> Any:
    """Return the head (1, D) of a reward model; None for a causal model."""
    return getattr(model, "score", None) if model.get_output_embeddings() is None else None


def linear_names(model: Any) -> dict[str, nn.Module]:
    """Return every layer that can have an adapter, by its full name; the head is the last one.

    A linear layer with a product of its own, such as one in groups, cannot, nor a tower's or a
    reward model's head.
    """
    towers = {name.rpartition(".")[0] for name, _ in tower_parameters(model)}
    head = reward_head(model)
    return {
        name: part
        for name, part in model.named_modules()
        if name not in towers
        and part is not head
        and (isinstance(part, Conv1D) or type(part) in (nn.Linear, Linear) or is_quantised(part))
    }


def expert_weights(model: Any) -> dict[str, nn.Parameter]:
    """Return the matrices (E, ., .) of all of a layer's experts in one, by their full names."""
    return {
        f"{name}.{own}": parameter
        for name, part in model.named_modules()
        if "expert" in f"{name}{type(part).__name__}".lower()
        for own, parameter in part.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def target_endings(model: Any, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the endings of layers' names and of parameters' names for peft.

    `all-linear` stands for all linear layers but the head, and for fused experts.

    Raises:
        ValueError: if no name ends in a target; lists the names.
    """
    head = model.get_output_embeddings()
    layers, experts = linear_names(model), expert_weights(model)
    # A layer of a list is named by its list too: peft takes a bare number for a decoder layer's.
    names = {re.sub(r".*?([^.]+(\.\d+)*)$", r"\1", n): part is head for n, part in layers.items()}
    names |= {".".join(name.split(".")[-2:]): False for name in experts}
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for target in targets:
        found = [name for name, is_head in names.items() if not is_head]
        for ending in found if target == ALL_LINEAR else [target]:
            matched = [part for name, part in layers.items() if f".{name}".endswith(f".{ending}")]
            fused = any(name.endswith(f".{ending}") for name in experts)
            if fused:
                parameters[ending] = None
            if matched and experts and ending.split(".")[-1] in OF_EXPERTS:
                if not is_quantised(matched[0]):
                    parameters[f"{ending}.weight"] = None
                elif target != ALL_LINEAR and not fused:
                    raise ValueError(
                        f"model.lora.targets: {target!r} cannot have an adapter on 4 bits, since "
                        "peft takes that name for the experts'; expected bf16 or float32"
                    )
            elif matched:
                modules[ending] = None
            elif not fused:
                raise ValueError(
                    f"model.lora.targets: no linear layer's name ends in {target!r}; expected "
                    f"{ALL_LINEAR} or among {', '.join(names)}"
                )
    if next(tower_parameters(model), None) is None:
        return list(modules), list(parameters)
    # full names, since layers of a tower have the same endings
    weights = [*experts, *(f"{name}.weight" for name in layers)]
    return _ending_in(layers, modules), _ending_in(weights, parameters)


def _ending_in(names: Iterable[str], endings: Iterable[str]) -> list[str]:
    ends = tuple(f".{ending}" for ending in endings)
    return [name for name in names if f".{name}".endswith(ends)]


def add_adapter(
    model: Any, *, rank: int, alpha: float, targets: Sequence[str], use_rslora: bool = False
) -> None:
    """Freeze the model and add a float32 adapter whose B is 0 (LoRA, arXiv 2106.09685).

    The product of A (r, D) and B (V, r) is scaled by alpha / r, or with `use_rslora` by alpha /
    sqrt(r) (arXiv 2312.03732). A target is `all-linear` (every linear layer but the head, and fused
    experts, each with a product of its own) or an ending of layers' names. A reward model's head
    stays trainable, in float32.

    Raises:
        ValueError: if the model has no such layer, or peft is not installed.
    """
    require_peft("model.lora.rank")
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype

    modules, parameters = target_endings(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM" if reward_head(model) is None else REWARD_TASK,
    )
    with quiet_peft():
        model.add_adapter(config, ADAPTER)  # which freezes every other parameter
    cast_adapter_dtype(model, ADAPTER)
    train_reward_head(model)


def train_reward_head(model: Any) -> None:
    """Make a reward model's head trainable, in at least float32, as its adapter is."""
    head = reward_head(model)
    if head is not None:
        head.to(torch.promote_types(head.weight.dtype, torch.float32)).requires_grad_(True)


def adapter_counts(model: Any) -> str:
    """Return a line: weights of the adapter, of the matrices it changes, and of those it does not.

    The latter are listed by the ends of their names, the most weights first.
    """
    from peft.tuners.lora import LoraLayer

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted, others = 0, Counter[str]()
    changed: set[tuple[int, str]] = set()
    for part in model.modules():
        if isinstance(part, LoraLayer):
            name = getattr(part, "parameter_name", "weight")
            changed.add((id(part.get_base_layer()), name))
            adapted += part.in_features * part.out_features * getattr(part, "num_experts", 1)
    for name, part in model.named_modules():
        for own, parameter in part.named_parameters(recurse=False):
            is_matrix = parameter.dim() > 1 and not own.endswith("bias")
            frozen = not parameter.requires_grad  # a reward model's head is trained
            if is_matrix and frozen and (id(part), own) not in changed:
                size = part.weight.quant_state.shape if is_quantised(part) else parameter.shape
                layer = name.replace(".base_layer", "").split(".")[-2:]
                others[".".join([*layer, own])] += math.prod(size)
    most = [f"{name} {number:,}" for name, number in others.most_common(5)]
    return (
        f"adapter of {trained:,} weights on matrices of {adapted:,}; without one: "
        f"{others.total():,} ({', '.join(most)}{', ...' if len(others) > len(most) else ''})"
    )


def adapter_parts(model: Any, name: str) -> list[Any]:
    """Return the matrices A and B of an adapter, in the order of the model's layers."""
    from peft.tuners.lora import LoraLayer

    return [
        matrices[name]
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for matrices in (layer.lora_A, layer.lora_B)
        if name in matrices
    ]


def add_second_adapter(model: Any, config: Any, name: str) -> None:
    """Add a further, frozen adapter that peft's `config` describes; the first one stays active.

    What was trained before still is.
    """
    from peft.functional import cast_adapter_dtype

    trained = {id(p) for p in model.parameters() if p.requires_grad}
    with quiet_peft():
        model.add_adapter(config, name)  # which switches to it, and freezes the others
    cast_adapter_dtype(model, name)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    switch_to(model, ADAPTER)


def like_first(model: Any, rank: int) -> Any:
    """Return peft's configuration of a sequence classifier's adapter like the model's first one.

    It has the same layers, but the vocabulary head, which a classifier does not have.
    """
    first, head = model.peft_config[ADAPTER], model.get_output_embeddings()
    name = next(name for name, part in model.named_modules() if part is head)
    targets = [each for each in first.target_modules if not f".{name}".endswith(f".{each}")]
    return replace(copy.deepcopy(first), r=rank, target_modules=targets, task_type=REWARD_TASK)


def has_adapter(model: Any) -> bool:
    """Return True if the model has an adapter."""
    return bool(getattr(model, "peft_config", None))


def adapter_rank(model: Any) -> int:
    """Return the rank of the model's adapter; 0 if it has none."""
    return int(model.peft_config[ADAPTER].r) if has_adapter(model) else 0


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Disable the adapter inside the context, so that the model is its frozen base."""
    if not has_adapter(model):
        yield
        return
    with adapter_active(model, None):
        yield


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Make a policy its own reference: its frozen base, with the adapter that it began with."""
    if START not in getattr(model, "peft_config", {}):
        with adapter_off(model):
            yield
        return
    with adapter_active(model, START):
        yield


def copy_start(model: Any) -> None:
    """Add a frozen copy of the adapter (`START`), which `as_reference` computes with."""
    add_second_adapter(model, copy.deepcopy(model.peft_config[ADAPTER]), START)
    pairs = zip(adapter_parts(model, START), adapter_parts(model, ADAPTER), strict=True)
    with torch.no_grad():
        for start, present in pairs:
            start.weight.copy_(present.weight)


@contextmanager
def adapter_active(model: Any, name: str | None) -> Iterator[None]:
    """Compute with this adapter alone inside the context, or with none; the others are off.

    What is trained stays as it is: peft's own switches would freeze the adapters that are off. A
    layer that this adapter does not change is its base.
    """
    before = switch_to(model, name)
    try:
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def switch_to(model: Any, name: str | None) -> list[tuple[Any, Any, bool]]:
    """Make one adapter, or none, the active one; return each layer with what it had before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    return before


def layer_adapter(layer: Any) -> LoraWeights | None:
    """Return the policy's adapter of a linear layer; None if there is none, or it is disabled."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or ADAPTER not in layer.lora_A:
        return None
    return LoraWeights(
        layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    )


def base_state(model: Any) -> dict[str, Any]:
    """Return the model's state without its adapter, under the names of the base model."""
    state: dict[str, Any] = model.state_dict()
    if not has_adapter(model):
        return state
    return {
        re.sub(r"(\.base_layer)+\.", ".", name): value
        for name, value in state.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def start_state(model: Any) -> dict[str, Any]:
    """Return the frozen copy of the adapter that training began with; empty if there is none."""
    return {name: value for name, value in model.state_dict().items() if f".{START}." in name}


def dense_state(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield `base_state`, each quantised weight replaced by the dense one that it stands for."""
    layers = {name.replace(".base_layer", ""): part for name, part in model.named_modules()}
    for name, value in base_state(model).items():
        layer_name, _, rest = name.partition(".weight")
        layer = layers.get(layer_name)
        if layer is None or not is_quantised(layer):
            yield name, value
        elif not rest:  # what follows `.weight.` are bitsandbytes' scales
            yield name, dense_layer(layer, model.dtype).weight


def untie_head(model: Any) -> None:
    """Give the head its own copy of a weight tied to the embedding, since the two will differ."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head = getattr(head, "base_layer", head)
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Merge the adapter into the weights, in place; the result is an ordinary, trainable model.

    A weight keeps its dtype, to which peft's merge rounds the sum. Quantised layers become dense
    ones in the dtype of the other weights: quantising them again would lose more of a small change
    than it keeps.
    """
    from peft.tuners.lora import LoraLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(end, LoraLayer) for end in ends):
        untie_head(model)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        base: nn.Module = layer.get_base_layer()
        if is_quantised(base):
            delta = layer.get_delta_weight(ADAPTER) if ADAPTER in layer.lora_A else None
            base = dense_layer(base, model.dtype, delta)
        else:
            layer.merge(adapter_names=[ADAPTER])
        if not name.endswith(".base_layer"):  # fused experts have a wrapper within a wrapper
            model.set_submodule(name, base)
    for name, part in list(model.named_modules()):
        if is_quantised(part):
            model.set_submodule(name, dense_layer(part, model.dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.requires_grad_(True)
    del model.peft_config
    model._hf_peft_config_loaded = False  # what transformers' save_pretrained looks at
