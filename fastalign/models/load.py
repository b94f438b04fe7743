"""Load and save causal models and reward models in transformers' layout."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import cached_file, logging

from fastalign.choices import Packing, PackingChoice
from fastalign.compute import ON_CPU, Compute
from fastalign.in_memory import model_of
from fastalign.model_files import (
    CONFIGURATIONS,
    FLOATS,
    WEIGHTS,
    fault_of_files,
    format_of_weights,
    read_object,
    reading,
)
from fastalign.models import attention
from fastalign.models.architecture import (
    auto_class,
    disable_dropout,
    is_reward_model,
    tower_parameters,
)
from fastalign.models.exactness import Verdict, check_exact, known_verdicts, verdict
from fastalign.models.fused_layers import fuse_layers
from fastalign.models.head import check_head
from fastalign.models.layers import skip_unread_tokens
from fastalign.models.lora import base_state, merge_adapter, start_state
from fastalign.models.lora_files import (
    SCORE_WEIGHT,
    adapter_base,
    format_of_base,
    is_reward_adapter,
    open_adapter,
    take_reward_entries,
)
from fastalign.models.low_bit import keep_differentiable, nf4_options
from fastalign.models.model_in_memory import class_that_opens, config_in_memory, copied
from fastalign.models.router import router_coefficient
from fastalign.ops.float32_products import use_fastest_products
from fastalign.ranks.whole_weights import whole, whole_state
from fastalign.ranks.world import ALONE, World
from fastalign.written_files import ADAPTER_CONFIG

# A language model's head, which a reward model does without.
HEADS = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}

# Settings of what is no text, in the folder of a multimodal model.
PROCESSOR_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)


def read_config(path: str | Path, *, trust_remote_code: bool) -> Any:
    """Read the configuration of a model.

    Raises:
        ValueError: if there is no model at `path`, or an adapter alone.
    """
    given = model_of(path)
    if given is not None:
        config = config_in_memory(given, str(path))
        check_not_quantised(config, path)
        return config
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model.path: expected a model, {path} is an adapter; merge it first (fastalign merge)"
        )
    where = repr(str(path))
    with reading(f"model.path: no model can be loaded from {where}", path, "config.json"):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    fault = fault_of_files(path, *CONFIGURATIONS)  # transformers passes over one of generation
    if fault is not None:
        raise ValueError(f"model.path: no model can be loaded from {where}: {fault}")
    check_not_quantised(config, path)
    return config


def check_not_quantised(config: Any, path: str | Path) -> None:
    """Raise ValueError, which names the method, if the configured weights are quantised."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    values = found if isinstance(found, dict) else found.to_dict()
    method = values.get("quant_method") or "an unnamed method"
    raise ValueError(
        f"model.path: the weights in {str(path)!r} are quantised by {method} "
        "(quantization_config in its config.json); expected the model that they were made from, "
        "in float32, bfloat16 or float16"
    )


def check_causal(config: Any, path: str | Path) -> None:
    """Raise ValueError for a classifier, or a type of which transformers has no causal model."""
    kind = (config.architectures or [config.model_type])[0]
    if kind.endswith("Classification"):
        raise ValueError(
            f"model.path: expected a causal model, got {kind} in {str(path)!r}, a classifier "
            "without a language-model head"
        )
    if auto_class(config) is None:
        raise ValueError(
            f"model.path: expected a causal model that generates text, got {kind} of type "
            f"{config.model_type!r} in {str(path)!r}"
        )


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Raise ValueError if a weight is not finite, with which every loss would be NaN."""
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"model.path: the weights in {str(path)!r} are damaged: {name} holds a value that "
                "is not finite"
            )


def model_options(
    config: Any, compute: Compute, dtype: torch.dtype, trust_remote_code: bool, *, reward: bool
) -> tuple[dict[str, Any], Verdict]:
    """Return the options that `from_pretrained` and `from_config` share, and the verdict.

    Raises:
        ValueError: if batches as `compute` wants them are not exact, or the attention cannot run.
    """
    attention.register()
    found = check_exact(config, compute.packing, reward=reward, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if found.kind == "packed":
        options["attn_implementation"] = attention.implementation_for(
            config, compute, dtype, found.needs
        )
    return options, found


def choose_packing(
    choice: PackingChoice,
    paths: Iterable[str | Path],
    *,
    trust_remote_code: bool = False,
    world: World = ALONE,
) -> Packing:
    """Return the packing that `choice` stands for: `auto` takes padded where that alone is exact.

    All ranks call this: rank 0 measures the models, and the others remember what it found.
    """

    def measured() -> tuple[Packing, dict[str, Verdict]]:
        packing: Packing = "shared_prefix" if choice == "auto" else choice
        for path in dict.fromkeys(paths):
            try:
                base = adapter_base(path) or path
                config = read_config(base, trust_remote_code=trust_remote_code)
                reward = is_reward_model(config, path) or is_reward_adapter(path)
            except ValueError:
                continue  # loading it gives the reason
            found = verdict(config, reward=reward, trust_remote_code=trust_remote_code)
            if choice == "auto" and packing != "padded" and found.kind == "padded":
                packing = "padded"
                print(f"packing: padded, since {path} cannot be packed exactly: {found.packed}")
        return packing, known_verdicts()

    packing, known = world.first_does(measured)
    known_verdicts().update(known)
    return packing


def read_model(auto: Any, path: str | Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Call `auto.from_pretrained`; return the model, and which keys were missing or unexpected.

    A model in memory is copied by the same code.

    Raises:
        ValueError: if weights are damaged, or have other shapes than the configuration says.
    """
    where = f"model.path: the weights in {str(path)!r}"
    fault = fault_of_files(path, *WEIGHTS)
    if fault is not None:
        raise ValueError(f"{where} cannot be read: {fault}")
    options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    open_model = partial(auto.from_pretrained, str(path), **options)
    given = model_of(path)
    if given is not None:
        trust = options.pop("trust_remote_code")
        config = read_config(path, trust_remote_code=trust)
        if "num_labels" in options:  # beside a configuration it would be the class's argument
            config.num_labels = options.pop("num_labels")
        name = str(path)
        opens = class_that_opens(auto, given, config, name=name, trust_remote_code=trust)
        open_model = partial(copied, opens, given, config, options)
    with without_load_report(), reading(f"{where} cannot be read as its config.json says", path):
        model, keys = open_model()
    if keys["mismatched_keys"]:  # transformers would draw them at random
        name, found, expected = min(keys["mismatched_keys"])
        raise ValueError(
            f"{where} are not those of its config.json: {name} is {tuple(found)}, expected "
            f"{tuple(expected)}"
        )
    return model, keys


def check_all_used(names: Iterable[str], path: str | Path) -> None:
    """Raise ValueError if tensors of the weights' files are left over: the model is another one.

    `names` are those that the model has no place for, except buffers that are computed anew.
    """
    unused = sorted(names)
    if unused:
        raise ValueError(
            f"model.path: the weights in {str(path)!r} hold {len(unused)} tensors that the model "
            f"of its config.json does not use ({', '.join(unused[:3])}"
            f"{', ...' if len(unused) > 3 else ''}): one of the two is not of this model"
        )


def check_tied(model: Any, path: str | Path) -> None:
    """Raise ValueError if weights that the configuration ties were both saved and differ.

    transformers would train them apart, other programs would not.
    """
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = sorted(set(wanted) - set(model.all_tied_weights_keys))
    if apart:
        raise ValueError(
            f"model.path: the weights in {str(path)!r} are not those of its config.json, which "
            f"ties {apart[0]} to {wanted[apart[0]]}: the two differ"
        )


def stored_dtype(path: str | Path, config: Any) -> torch.dtype:
    """Return the dtype that most of a checkpoint's weights have in its files.

    Of a hub name, and of files that are not safetensors, it is what the configuration says.
    """
    found = format_of_weights(path)
    if found is not None:
        return FLOATS[found]
    said: torch.dtype | None = getattr(config, "dtype", None)
    return torch.float32 if said is None else said


def set_save_dtype(model: Any, name: str) -> None:
    """Set the dtype in which `save_model` writes a loaded model; auto leaves the checkpoint's."""
    if name != "auto":
        model.save_dtype = getattr(torch, name)


def as_used(model: Any, found: Verdict) -> Any:
    """Put a model in evaluation mode, without dropout and without work that nothing reads.

    What no text goes through is frozen.
    """
    model.verdict = found
    disable_dropout(model)
    use_fastest_products(model)
    fuse_layers(model)
    for _, parameter in tower_parameters(model):
        parameter.requires_grad_(False)
    if found.skips and not router_coefficient(model):  # whose loss is of all tokens
        skip_unread_tokens(model)
    return model.eval()


def ready(
    model: Any, path: str | Path, device: torch.device, save_dtype: torch.dtype, found: Verdict
) -> Any:
    """Move a model to its device, check its weights, and put it in evaluation mode."""
    model.save_dtype = save_dtype
    model = model.to(device)
    check_finite(model, path)
    return as_used(model, found)


def load_policy(
    path: str | Path,
    compute: Compute = ON_CPU,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    nf4: bool = False,
    keep_adapter: bool = False,
) -> Any:
    """Load a causal model from a folder in transformers' layout, or from the hub.

    `save_model` writes it in the dtype of the checkpoint, which its attribute `save_dtype` holds.

    Args:
        path: folder or hub name; of a folder in peft's layout, the base with the adapter merged.
            The weights of a base that was nf4 in training are those that nf4 stands for.
        compute: how the model will be run: its device; its packing, under which a small copy of
            it has to be exact (`exactness.py`); and its attention.
        dtype: dtype of the parameters.
        trust_remote_code: run code that comes with the model.
        nf4: quantise the weights of every linear layer but the head; such a model is frozen.
        keep_adapter: leave an adapter in `path` on its frozen base, to be trained, not merged.

    Raises:
        ValueError: if there is no model, or a classifier; the architecture cannot be packed, or its
            head is unknown; a weight is missing or not finite; an adapter does not fit its base;
            peft or bitsandbytes is needed and not installed.
    """
    base = adapter_base(path)
    if base is not None and is_reward_adapter(path):
        raise ValueError(
            f"model.path: expected a causal model, {path} is the adapter of a reward model"
        )
    source = path if base is None else base
    config = read_config(source, trust_remote_code=trust_remote_code)
    check_causal(config, source)
    nf4 = nf4 or (base is not None and not keep_adapter and format_of_base(path) == "nf4")
    if nf4 and config.get_text_config() is not config:
        raise ValueError(
            f"model.lora.base: nf4 would quantise the towers of the multimodal model {str(path)!r} "
            "as well; expected bf16 or float32"
        )
    low_bit = nf4_options(dtype, compute.device, path) if nf4 else {}
    options, found = model_options(config, compute, dtype, trust_remote_code, reward=False)
    model, keys = read_model(auto_class(config), source, options | low_bit)
    if keys["missing_keys"]:  # transformers would draw them at random
        raise ValueError(
            f"model.path: the weights in {str(source)!r} are incomplete: no "
            f"{min(keys['missing_keys'])}"
        )
    check_all_used(keys["unexpected_keys"], source)
    check_tied(model, source)
    if nf4:
        keep_differentiable(model)
    if base is not None:
        open_adapter(model, path)
        if not keep_adapter:
            merge_adapter(model)
    model = ready(model, path, compute.device, stored_dtype(source, config), found)
    check_head(model)
    return model


def load_reward_model(
    path: str | Path,
    compute: Compute = ON_CPU,
    *,
    seed: int = 0,
    fresh_head: bool = True,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    nf4: bool = False,
    keep_adapter: bool = False,
) -> Any:
    """Load a reward model: a saved one with its head, or a causal model under a fresh one.

    A fresh head is drawn from N(0, 1 / (D + 1)), as in Stiennon et al. (arXiv 2009.01325).

    Args:
        path: folder in transformers' layout, or a hub name; of a reward model's adapter in peft's
            layout, the base with the adapter merged, as in `load_policy`, under its head.
        compute: as for `load_policy`.
        seed: random seed of a fresh head.
        fresh_head: False: a saved head is required, as for scoring.
        dtype: dtype of the parameters.
        trust_remote_code: run code that comes with the model.
        nf4: quantise the weights of every linear layer but the head; such a model is frozen.
        keep_adapter: leave an adapter in `path` on its frozen base, to be trained, not merged.

    Raises:
        ValueError: if there is no model, it is of another kind, or weights are missing; an adapter
            is a causal model's, or does not fit its base.
    """
    base = reward_adapter_base(path)
    source = path if base is None else base
    config = read_config(source, trust_remote_code=trust_remote_code)
    has_head = is_reward_model(config, source)
    if not has_head and base is None and not fresh_head:
        raise ValueError(
            f"model.path: expected a trained reward model, got {config.architectures or 'none'} in "
            f"{str(path)!r}; fastalign reward trains one"
        )
    nf4 = nf4 or (base is not None and not keep_adapter and format_of_base(path) == "nf4")
    low_bit = nf4_options(dtype, compute.device, path) if nf4 else {}
    options, found = model_options(config, compute, dtype, trust_remote_code, reward=True)
    options["num_labels"] = 1
    model, keys = read_model(AutoModelForSequenceClassification, source, options | low_bit)
    # transformers draws missing weights at random; only a fresh head may be.
    missing = set(keys["missing_keys"]) - (set() if has_head else {SCORE_WEIGHT})
    foreign = {name for name in keys["unexpected_keys"] if name.startswith("score")}
    if missing or foreign:
        what = f"has no {min(missing)}" if missing else f"has a {min(foreign)}"
        raise ValueError(
            f"model.path: expected a reward model with score.weight alone as its head, but "
            f"{str(source)!r} {what}"
        )
    check_all_used(set(keys["unexpected_keys"]) - HEADS, source)
    if not has_head:
        draw_head(model.score, seed)
    if nf4:
        keep_differentiable(model)
    if base is not None:
        open_adapter(model, path)
        take_reward_entries(model, path)
        if not keep_adapter:
            merge_adapter(model)
    model.get_input_embeddings().padding_idx = None  # every token's embedding is trained
    return ready(model, path, compute.device, stored_dtype(source, config), found)


def reward_adapter_base(path: str | Path) -> str | None:
    """Return the base of a reward model's adapter; None for the folder of a whole model.

    Raises:
        ValueError: if it is the adapter of a causal model.
    """
    base = adapter_base(path)
    if base is not None and not is_reward_adapter(path):
        raise ValueError(
            f"model.path: {path} is an adapter; merge it first (fastalign merge), or expected that "
            "of a reward model"
        )
    return base


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers' table of missing and unexpected weights, which are checked here.

    Its progress bar is silent, too: of a model in memory it shows a copy.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the bars by which transformers shows that it reads and writes weights."""
    shows = logging.is_progress_bar_enabled()
    if shows:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()


@torch.no_grad()
def draw_head(score: nn.Linear, seed: int) -> None:
    """Fill the weight (1, D) from a generator of its own: it depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    std = (score.in_features + 1) ** -0.5
    values = torch.randn(score.weight.shape, generator=generator) * std
    score.weight.copy_(values)


def model_without_weights(
    path: str | Path,
    compute: Compute,
    *,
    reward: bool,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    keep_adapter: bool = False,
) -> Any:
    """Build the model that `load_policy` or `load_reward_model` would load, freshly initialised.

    Call it where tensors have no data (meta or fake).

    The arguments are those of the two functions.

    Raises:
        ValueError: if there is no model, or the function would refuse it.
    """
    base = reward_adapter_base(path) if reward else adapter_base(path)
    config = read_config(base or path, trust_remote_code=trust_remote_code)
    options, found = model_options(config, compute, dtype, trust_remote_code, reward=reward)
    if reward:
        is_reward_model(config, path)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, **options)
        if base is not None:
            if keep_adapter:
                open_adapter(model, path)
            take_reward_entries(model, path)
        model.get_input_embeddings().padding_idx = None  # as `load_reward_model` has it
    else:
        check_causal(config, path)
        model = auto_class(config).from_config(config, **options)
        if base is not None and keep_adapter:
            open_adapter(model, path)
    return as_used(model, found)


def save_model(
    model: Any, tokenizer: Any, folder: str | Path, *, leave_out: tuple[str, ...] = ()
) -> None:
    """Write weights, configuration and tokenizer in transformers' layout.

    If ranks share the model, all of them call this, and rank 0 writes; `model` is None on a rank
    that has none. `leave_out` names parameters that are not the architecture's own. A model that
    was loaded by this module is written in the dtype `model.save_dtype`; it keeps its own.

    Raises:
        ValueError: if that dtype cannot hold a weight.
    """
    state = None if model is None else whole_state(model)
    if state is not None:
        weights = {name: value for name, value in state.items() if name not in leave_out}
        write_model(model, weights, tokenizer, folder)


def write_model(model: Any, weights: dict[str, Tensor], tokenizer: Any, folder: str | Path) -> None:
    """Write these weights under a model's configuration, as `save_model` does on rank 0."""
    dtype = getattr(model, "save_dtype", None)
    if dtype is not None:
        weights = as_dtype(weights, dtype)
    with without_bars():
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if next(tower_parameters(model), None) is not None:
        copy_processor(model.name_or_path, folder)
    if dtype not in (None, model.dtype):
        file = Path(folder) / "config.json"
        values = read_object(file) | {"dtype": str(dtype).removeprefix("torch.")}
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        file.write_text(text, encoding="utf-8")


def copy_processor(source: str, folder: str | Path) -> None:
    """Copy the settings of images, sounds and videos, which are a processor's beside a tokenizer.

    `source` is the model's folder, or its hub name.
    """
    for name in PROCESSOR_FILES:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, Path(folder) / name)


def as_dtype(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in a dtype, in host memory where they change; tied ones stay one tensor.

    Raises:
        ValueError: if a value is finite, and in that dtype it is not; names the first tensor.
    """
    cast: dict[Any, Tensor] = {}
    found = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride())
        if not value.is_floating_point() or value.dtype == dtype:
            found[name] = value
            continue
        if key not in cast:
            cast[key] = value.detach().to(dtype).cpu()
            if bool((cast[key].isinf() & ~value.isinf().cpu()).any()):
                raise ValueError(
                    f"model.save_dtype: {name} holds {value.abs().max().item():g}, which is beyond "
                    f"{str(dtype).removeprefix('torch.')}; expected float32 or bfloat16"
                )
        found[name] = cast[key]
    return found


def save_reward_model(
    model: Any, tokenizer: Any, folder: str | Path, *, leave_out: tuple[str, ...] = ()
) -> None:
    """Write a reward model whose pad token is set, so that transformers serves the same scores.

    The arguments are those of `save_model`; the tokenizer has the same pad token.
    """
    if model is not None:
        assert model.config.pad_token_id == tokenizer.pad_token_id, "the served score depends on it"
    save_model(model, tokenizer, folder, leave_out=leave_out)


def model_fingerprint(model: Any, *, configuration: bool = True) -> str:
    """Return the SHA-256 of the configuration, if asked for, and the weights with their names.

    A sharded model has the fingerprint of the whole one, and all its ranks have to call this. An
    adapter is left out, so that runs with different adapters share what they compute of a base; the
    frozen one that a run began with is a part of its reference.
    """
    digest = hashlib.sha256(model.config.to_json_string().encode() if configuration else b"")
    for name, value in sorted((base_state(model) | start_state(model)).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        plain: Tensor = whole(value.detach()).cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return str(digest.hexdigest())
