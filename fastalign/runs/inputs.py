"""The inputs of a run: its data and models, loaded under its rules, its steps, and fingerprints.

Models get their adapter, and the ranks share them. A checkpoint keeps the fingerprints, which a
resumed run compares: an input is a dictionary of its parts (a file, a key of a configuration) to a
hash or a plain value, so that a difference can be named.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastalign.batch.schedule import Mixture, indices_of_step
from fastalign.batch.stored import stored
from fastalign.choices import Packing
from fastalign.compute import Compute, memory_used_in
from fastalign.data.encode import Ties
from fastalign.data.load import (
    TokenizedDataset,
    load_examples,
    load_sources_of_data,
    print_sources,
)
from fastalign.data.tokenizer import Tokenizer, eos_token_ids, load_tokenizer, print_added_tokens
from fastalign.data_sources import WeightedSource, weighted_sources
from fastalign.models.architecture import num_positions
from fastalign.models.attention import attention_name
from fastalign.models.layers import compile_layers
from fastalign.models.load import (
    HEADS,
    choose_packing,
    load_policy,
    load_reward_model,
    model_fingerprint,
    model_without_weights,
    set_save_dtype,
)
from fastalign.models.lora import ADAPTER, adapter_counts, add_adapter, copy_start, has_adapter
from fastalign.models.lora_files import (
    WEIGHTS_FILE,
    adapter_base,
    check_no_adapter,
    print_other_format,
)
from fastalign.models.router import check_router
from fastalign.ranks.parallel import load_on_first, share_by_ddp, share_by_fsdp
from fastalign.ranks.world import ALONE, World
from fastalign.runs.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PreferenceDataConfig,
    TrainingConfig,
)
from fastalign.written_files import sha256_of
from fastalign.yaml_file import flat_settings

LOADING = "loading "  # how the note on a model that is being loaded begins


def check_positions(model: Any, data: TokenizedDataset) -> None:
    """Raise ValueError for the first row of more tokens than the model has positions."""
    limit = num_positions(model.config)
    if limit is None:
        return
    for place, longest in enumerate(stored(data.groups).longest()):
        if longest > limit:
            raise ValueError(
                f"{data.sources[place]}: {longest} tokens, but the model has {limit} positions; "
                f"lower --data.max-length to at most {limit}"
            )


def load_data(
    config: Any, source: str, tokenizer: Tokenizer, *, keep_ties: bool = False
) -> TokenizedDataset:
    """Load demonstrations or pairs under the run's rules; a loss with ties keeps ties."""
    data, compared = config.data, isinstance(config.data, PreferenceDataConfig)
    ties: Ties = "error"
    if compared:
        ties = "keep" if keep_ties or config.loss.uses_ties else data.ties
    return load_examples(
        source,
        data.kind,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        on_too_long=data.on_too_long,
        ties=ties,
    )


def packing_of_run(config: TrainingConfig, world: World = ALONE) -> Packing:
    """Return the packing of a run's batches, exact for all of its models; all ranks call this."""
    others = (getattr(config, section, None) for section in ("reference", "teacher", "value"))
    paths = [config.model.path, *(getattr(other, "path", None) for other in others)]
    return choose_packing(
        config.train.packing,
        [path for path in paths if path is not None],
        trust_remote_code=config.model.trust_remote_code,
        world=world,
    )


def load_sets(
    config: Any, model: Any, tokenizer: Tokenizer
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Load the training data, of all their sources, and the held-out data if there are any.

    Raises:
        ValueError: if a source is at fault, naming file and row, or a row is too long.
        FileNotFoundError: if a file does not exist.
    """
    named = [weighted_sources(config.data.train)]
    if config.data.eval is not None:
        named.append([WeightedSource(config.data.eval)])
    sets = [
        load_sources_of_data(sources, lambda path: load_data(config, path, tokenizer))
        for sources in named
    ]
    for data in sets:
        data.report.print_losses()
        check_positions(model, data)
    print_sources(sets[0].parts)
    if has_adapter(model):
        print_added_tokens(tokenizer, [stored(sets[0].groups).used_ids()])
    return sets[0], sets[1] if len(sets) > 1 else None


def total_steps(config: TrainingConfig, num_examples: int) -> int:
    """Return `max_steps`, or the steps of `epochs` passes (the last one may reach beyond).

    `num_examples` are those of an epoch, here and below.
    """
    if config.train.max_steps is not None:
        return config.train.max_steps
    size = examples_per_step(config, num_examples)
    return max(1, math.ceil(config.train.epochs * num_examples / size))


def examples_per_step(config: TrainingConfig, num_examples: int) -> int:
    """Return `train.batch_size`, or the number of all examples if there are fewer.

    Prompts that are sampled are taken several times instead: each time has other completions.
    """
    if isinstance(config.data, DataConfig):
        return min(config.train.batch_size, num_examples)
    return config.train.batch_size


def print_small_data(config: TrainingConfig, num_examples: int) -> None:
    """Print how a batch larger than the data is filled."""
    size = config.train.batch_size
    if size <= num_examples:
        return
    if isinstance(config.data, DataConfig):
        done = "a step takes each example once"
    else:
        least, rest = divmod(size, num_examples)
        times = f"{least} or {least + 1}" if rest else f"{least}"
        done = f"a step samples each prompt {times} times"
    print(f"{num_examples} examples, train.batch_size {size}: {done}")


def indices_of_run(config: TrainingConfig, mixture: Mixture) -> set[int]:
    """Return the examples that the run will use."""
    used: set[int] = set()
    for step in range(total_steps(config, mixture.epoch_size)):
        if len(used) == sum(mixture.sizes):
            break
        size = examples_per_step(config, mixture.epoch_size)
        used.update(indices_of_step(mixture, size, step, seed=config.run.seed))
    return used


def load_for_training(
    config: TrainingConfig, compute: Compute, extend: Callable[[Any], None] | None = None
) -> tuple[Any, Tokenizer]:
    """Load the policy, its float32 weights or a frozen base with an adapter, and its tokenizer.

    `extend` adds what else the policy's module is to hold, before the ranks share it.
    """
    goes_on = begins_with_adapter(config.model)
    model, tokenizer = load_model(
        config.model.path,
        config.model,
        compute,
        dtype=base_dtype(config.model, compute),
        nf4=config.model.lora.base == "nf4",
        keep_adapter=goes_on,
    )
    check_router(model, config.model.path)
    if goes_on:
        keep_start(model, config.model)
    else:
        add_new_adapter(model, config.model)
    if extend is not None:
        extend(model)
    return share(ready_for_training(model, config), compute), tokenizer


def load_reward_for_training(config: TrainingConfig, compute: Compute) -> tuple[Any, Tokenizer]:
    """Load a reward model, which the caller shares, and its tokenizer.

    Its weights are float32 master weights, or a frozen base with an adapter under a trained head.
    """
    path, lora = config.model.path, config.model.lora
    if lora.rank:
        check_no_adapter("model.path", path)
    tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    dtype = base_dtype(config.model, compute)
    model = load_reward_network(path, config, compute, dtype=dtype, nf4=lora.base == "nf4")
    check_vocabulary(model, tokenizer, path)
    print(f"attention of {path}: {attention_name(model)}")
    add_new_adapter(model, config.model)
    return ready_for_training(model, config), tokenizer


def load_reward_network(
    path: str,
    config: TrainingConfig,
    compute: Compute,
    *,
    dtype: torch.dtype = torch.float32,
    nf4: bool = False,
    keep_adapter: bool = False,
) -> Any:
    """Load a reward model's network; draw a head by the run's seed if it has none.

    With `keep_adapter` an adapter in `path` stays one, to be trained.
    """
    trust, seed = config.model.trust_remote_code, config.run.seed
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust,
        "keep_adapter": keep_adapter,
    }
    model = loaded(
        path,
        compute,
        lambda where: load_reward_model(path, where, seed=seed, nf4=nf4, **options),
        lambda: model_without_weights(path, compute, reward=True, **options),
    )
    set_save_dtype(model, config.model.save_dtype)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        print(f"{path}: the router's auxiliary loss is not added, as in transformers' classifiers")
    return model


def ready_for_training(model: Any, config: TrainingConfig) -> Any:
    """Checkpoint the model's activations and compile its layers, if the settings ask for it."""
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    if config.train.compile:
        compile_layers(model)
    return model


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # these alone: dropout and jitter inside of layers stay off
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers checkpoints only in this mode


def base_dtype(config: ModelConfig, compute: Compute) -> torch.dtype:
    """Return the dtype of the weights under an adapter; without one it is float32.

    Raises:
        ValueError: if the base's precision is not the run's.
    """
    lora = config.lora
    if lora.base == "bf16" and compute.dtype != torch.bfloat16:
        raise ValueError(
            "model.lora.base: a bf16 base computes in bf16; expected --train.precision bf16 with "
            f"it, got {str(compute.dtype).removeprefix('torch.')}"
        )
    return torch.float32 if lora.base == "float32" else compute.dtype


def begins_with_adapter(config: ModelConfig) -> bool:
    """Return whether training goes on with the adapter in `model.path`, and adds no new one."""
    return config.lora.rank > 0 and adapter_base(config.path) is not None


def keep_start(model: Any, config: ModelConfig) -> None:
    """Keep a frozen copy of the adapter that training goes on with: it is the reference.

    Raises:
        ValueError: if a setting is given that the adapter does not have.
    """
    found, lora = model.peft_config[ADAPTER], config.lora
    own = {"rank": found.r, "alpha": found.lora_alpha, "use_rslora": found.use_rslora}
    usual = LoraConfig()
    if lora.targets != usual.targets:
        raise ValueError(
            f"model.lora.targets: expected none, since training goes on with the adapter in "
            f"{config.path}, on its layers; got {', '.join(lora.targets)}"
        )
    for name, value in own.items():
        given = getattr(lora, name)
        if given != value and (name == "rank" or given != getattr(usual, name)):
            raise ValueError(
                f"model.lora.{name}: expected {value}, as the adapter in {config.path} has, with "
                f"which training goes on; got {given}"
            )
    without_weights = any(p.is_meta for p in model.parameters())  # another rank reads them
    with torch.device("meta") if without_weights else nullcontext():
        copy_start(model)
    print_other_format(config.path, lora.base)
    print(f"goes on with the adapter in {config.path}; the reference is the adapter as it is there")
    print(adapter_counts(model))


def add_new_adapter(model: Any, config: ModelConfig, rank: int | None = None) -> None:
    """Add the adapter that the settings describe to a model, if they describe one.

    `rank` is another one than theirs, of a model without a vocabulary head.
    """
    lora = config.lora
    targets = lora.targets
    if rank is not None:
        targets = tuple(name for name in targets if f"{name}.weight" not in HEADS)
    rank = lora.rank if rank is None else rank
    if not rank:
        return
    without_weights = any(p.is_meta for p in model.parameters())  # another rank reads them
    with torch.device("meta") if without_weights else nullcontext():
        add_adapter(
            model,
            rank=rank,
            alpha=lora.alpha,
            targets=targets,
            use_rslora=lora.use_rslora,
        )
    print(adapter_counts(model))


def load_model(
    path: str,
    config: ModelConfig,
    compute: Compute,
    *,
    dtype: torch.dtype = torch.float32,
    nf4: bool = False,
    keep_adapter: bool = False,
) -> tuple[Any, Tokenizer]:
    """Load a causal model, which the caller shares among the ranks, and its tokenizer.

    With `keep_adapter` an adapter in `path` stays one, to be trained.

    Raises:
        ValueError: if the tokenizer has more tokens than the model.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": config.trust_remote_code,
        "keep_adapter": keep_adapter,
    }
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    model = loaded(
        path,
        compute,
        lambda where: load_policy(path, where, nf4=nf4, **options),
        lambda: model_without_weights(path, compute, reward=False, **options),
    )
    set_save_dtype(model, config.save_dtype)
    check_vocabulary(model, tokenizer, path)
    print(f"attention of {path}: {attention_name(model)}")
    return model, tokenizer


def check_vocabulary(model: Any, tokenizer: Tokenizer, path: str) -> None:
    """Raise ValueError, which names the folder, if the tokenizer has more tokens than the model."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"model.path: the tokenizer in {path} has {len(tokenizer)} tokens, the model {num_rows}"
        )


def check_sharing(config: TrainingConfig) -> None:
    """Raise ValueError, which names them, for settings that do not work with FSDP2's shards."""
    if config.parallel.strategy != "fsdp":
        return
    if config.model.lora.base == "nf4":
        raise ValueError(
            "model.lora.base: nf4 is not sharded; expected bf16 or float32 with "
            "--parallel.strategy fsdp, or --parallel.strategy ddp"
        )
    if config.optim.states != "float32":
        raise ValueError(
            "optim.states: 8bit states are not sharded; expected float32 with "
            "--parallel.strategy fsdp (each rank holds its part of them)"
        )
    for name in ("reference", "teacher"):
        if getattr(getattr(config, name, None), "offload", False):
            raise ValueError(
                f"{name}.offload: a sharded {name} is not offloaded by layers; expected "
                "--parallel.offload with --parallel.strategy fsdp"
            )


def loaded(
    path: str, compute: Compute, load: Callable[[Compute], Any], skeleton: Callable[[], Any]
) -> Any:
    """Load a model on each rank; if it will be sharded, load the weights on rank 0 alone.

    `load` reads it to the device of the `Compute` that it is given, `skeleton` makes the same model
    without weights.
    """
    with memory_used_in(f"{LOADING}{path}"):
        if compute.parallel.strategy == "fsdp":
            host = replace(compute, device=torch.device("cpu"))
            return load_on_first(compute.world, lambda: load(host), skeleton)
        return load(compute)


def share(model: Any, compute: Compute) -> Any:
    """Share the model among the run's ranks; it must be as it will be trained.

    A frozen model that is not sharded is each rank's own.
    """
    if compute.parallel.strategy == "fsdp":
        share_by_fsdp(
            model,
            dtype=compute.dtype,
            device=compute.device,
            reshard_after_forward=compute.parallel.reshard_after_forward,
            offload=compute.parallel.offload,
        )
    elif compute.world.size > 1 and any(p.requires_grad for p in model.parameters()):
        share_by_ddp(model)
    return model


# Keys of a configuration that say nothing about what the model computes.
NO_INPUT = (
    *("transformers_version", "_name_or_path", "architectures"),
    *("dtype", "torch_dtype", "use_cache"),
)
# Every input, as a message names it; by the names on the left --run.accept-changed takes them.
NAMES = {
    "data": "training data",
    "eval_data": "held-out data",
    "ptx_data": "data of ppo.ptx_data",
    "model": "starting model",
    "base": "frozen base in model.path",
    "reference": "frozen reference",
    "teacher": "frozen teacher",
    "value": "starting value model",
    "reward": "reward",
    "tokenizer": "tokenizer",
}

Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run beside its model and its training data.

    Attributes:
        tokenizer: tokenizer of the model, or None.
        held_out: data of evaluations, with a `fingerprint`, or None.
        reference_fingerprint: fingerprint of a frozen reference, which a checkpoint does not hold
            and a resumed run must find again.
        others: parts of further inputs, by the names in `NAMES`.
    """

    tokenizer: Tokenizer | None = None
    held_out: Any = None
    reference_fingerprint: str | None = None
    others: Mapping[str, Parts] = field(default_factory=dict)


def fingerprints(config: TrainingConfig, model: Any, data: Any, inputs: Inputs) -> dict[str, Parts]:
    """Return the parts of every input; if ranks share the model, all of them call this.

    `model` is the policy or reward model before its first step; `data`, the training data, have a
    `fingerprint`.
    """
    reference = inputs.reference_fingerprint
    found: dict[str, Parts] = {
        "data": data_parts(data),
        "base": {"weights": model_fingerprint(model) if has_adapter(model) else None},
        "reference": {"weights": reference},
        **inputs.others,
    }
    # The weights are hashed once: as the base, as the reference, or here.
    other = getattr(getattr(config, "reference", None), "path", None) is not None
    hashed = has_adapter(model) or (reference is not None and not other)
    found["model"] = model_parts(model, weights=not hashed)
    if begins_with_adapter(config.model):
        adapter = Path(config.model.path).expanduser() / WEIGHTS_FILE
        found["model"] = {**found["model"], **file_parts(adapter)}
    if inputs.held_out is not None:
        found["eval_data"] = {"path": str(config.data.eval), "content": inputs.held_out.fingerprint}
    if inputs.tokenizer is not None:
        found["tokenizer"] = tokenizer_parts(inputs.tokenizer, config.model.path)
    return found


def inputs_of_all(ranks: Sequence[Mapping[str, Parts]]) -> Mapping[str, Parts]:
    """Return the inputs of rank 0, which every other rank must have too.

    Raises:
        ValueError: if a rank has others: another file of that name, or another object in memory.
    """
    for rank, found in enumerate(ranks):
        for name in (name for name in NAMES if found.get(name) != ranks[0].get(name)):
            raise ValueError(
                f"the {NAMES[name]} of rank {rank} differs from rank 0's; expected one for all: "
                "files with the same content, objects made with the same seed and order"
            )
    return ranks[0]


def data_parts(data: Any) -> Parts:
    """Return the fingerprint of the training data, or that of each source if there are several."""
    sources = getattr(data, "parts", ())
    if len(sources) < 2:
        return {"content": data.fingerprint}
    return {part.source: part.fingerprint for part in sources}


def model_parts(model: Any, *, weights: bool = True) -> Parts:
    """Return a model's configuration key by key and, if asked for, a hash of its weights."""
    if not hasattr(model, "config"):
        return {}
    values = json.loads(model.config.to_json_string(use_diff=False))
    leaves = flat_settings(values).items()
    parts = {f"{key} of config.json": value for key, value in leaves if key not in NO_INPUT}
    if weights:
        parts["weights"] = model_fingerprint(model, configuration=False)
    return parts


def tokenizer_parts(tokenizer: Tokenizer, path: str) -> Parts:
    """Return hashes of the vocabulary and the chat template, and the tokens that end an answer."""
    return {
        "vocabulary": digest_of(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat template": digest_of(json.dumps(tokenizer.chat_template)),
        "end tokens": list(eos_token_ids(tokenizer, path)),
    }


def file_parts(path: str | Path) -> Parts:
    """Return the hash of a file's bytes, by its name."""
    return {Path(path).name: sha256_of(Path(path))}


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def changed_inputs(saved: Mapping[str, Any], now: Mapping[str, Parts]) -> dict[str, str]:
    """Compare a resumed run's inputs with those in a checkpoint's `state.json`.

    A key of a configuration that one side alone has is not compared: another release of
    transformers has other keys.

    Returns:
        For each input that differs, the words of a message for it, with the parts that differ.
    """
    before = saved.get("inputs") or {
        "data": {"content": saved.get("data_fingerprint")},  # of an earlier version
        "base": {"weights": saved.get("base_fingerprint")},
        "reference": {"weights": saved.get("reference_fingerprint")},
    }
    changed: dict[str, str] = {}
    for name in (name for name in NAMES if name in before and name in now):
        old, new = before[name], now[name]
        of_config = " of config.json"
        keys = [key for key in new if key in old or not key.endswith(of_config)]
        keys += [key for key in old if key not in new and not key.endswith(of_config)]
        differing = [key for key in keys if old.get(key) != new.get(key)]
        if differing and not (name == "eval_data" and "path" in differing):  # the setting changed
            changed[name] = described(name, old, new, differing)
    return changed


def described(name: str, old: Parts, new: Parts, differing: list[str]) -> str:
    """Return an input's name with the parts that differ, plain values with both sides."""
    words = []
    for key in differing:
        plain = not isinstance(old.get(key), str) or len(old[key]) < 64
        values = f" {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}" if plain else ""
        words.append(key + values)
    if words in (["content"], ["weights"]) or name in ("base", "reference"):
        return NAMES[name]
    return f"{NAMES[name]} ({'; '.join(words[:4])}{'; ...' if len(words) > 4 else ''})"
