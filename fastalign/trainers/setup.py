"""What every algorithm does before its first step: model, tokenizer, and whether they fit."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fastalign.data import (
    TokenizedDataset,
    Tokenizer,
    load_preferences,
    load_sft,
    load_tokenizer,
)
from fastalign.models import (
    adapter_base,
    add_adapter,
    attention_of,
    compile_layers,
    load_policy,
    load_reward_model,
    model_without_weights,
    part_from_ranks,
)
from fastalign.trainers.any_config import AnyConfig, config_to_dict
from fastalign.trainers.compute import Compute, make_compute
from fastalign.trainers.config import DPOConfig, ModelConfig, RewardConfig, SFTConfig
from fastalign.trainers.heartbeat import watched_by_ranks
from fastalign.trainers.optimizer import adamw
from fastalign.trainers.process_memory import out_of_memory_in_one_line
from fastalign.trainers.run_folder import announce, locked, prepare_run_folder
from fastalign.trainers.sharing import check_sharing, loaded, share
from fastalign.trainers.state import seed_everything
from fastalign.world import open_world, world_of_environment

# What trains on rows that are there before the run, responses and all.
OnRows = SFTConfig | DPOConfig | RewardConfig


@contextmanager
def opened_run(config: AnyConfig) -> Iterator[Compute]:
    """Joins the ranks; prepares and holds the run's folder; prints the settings; seeds everything.

    Rank 0 speaks for all: the others print nothing.

    Raises:
        ValueError: the folder holds another run, or is in use; a library is missing; memory did
            not suffice; settings that do not go together; the ranks do not meet.
    """
    adamw(config.optim.states)  # what is not installed is said before hours of work
    check_sharing(config)
    world = world_of_environment()
    compute = make_compute(config.train, world, config.parallel)
    values = config_to_dict(config)
    folder = Path(config.run.dir)
    with ExitStack() as stack:
        stack.enter_context(
            open_world(
                world,
                timeout_seconds=config.parallel.timeout_seconds,
                always=config.parallel.strategy == "fsdp",
            )
        )
        stack.enter_context(watched_by_ranks(world, config.parallel))
        if not world.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        world.first_does(lambda: prepare_run_folder(folder, values, resume=config.run.resume))
        world.first_does(lambda: stack.enter_context(locked(folder)))
        stack.enter_context(out_of_memory_in_one_line(config))
        announce(values)
        seed_everything(config.run.seed)
        yield compute
        part_from_ranks()


def load_for_training(config: AnyConfig, compute: Compute) -> tuple[Any, Tokenizer]:
    """The policy with float32 master weights, or a frozen base with an adapter; its tokenizer.

    Raises:
        ValueError: what `base_dtype`, `load_model` and `add_adapter` refuse.
    """
    model, tokenizer = load_model(
        config.model.path,
        config.model,
        compute,
        dtype=base_dtype(config.model, compute),
        nf4=config.model.lora.base == "nf4",
    )
    with torch.device("meta") if is_skeleton(model) else nullcontext():
        add_new_adapter(model, config.model)
    return share(ready_for_training(model, config), compute), tokenizer


def load_reward_for_training(config: AnyConfig, compute: Compute) -> tuple[Any, Tokenizer]:
    """A reward model with float32 master weights, and its tokenizer; the caller shares it."""
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model = load_reward_network(config.model.path, config, compute)
    check_vocabulary(model, tokenizer, config.model.path)
    print(f"attention of {config.model.path}: {attention_of(model)}", flush=True)
    return ready_for_training(model, config), tokenizer


def load_reward_network(path: str, config: AnyConfig, compute: Compute) -> Any:
    """A reward model's network, its head drawn by the run's seed if it has none."""
    options: dict[str, Any] = {
        "packing": compute.packing,
        "attention_name": compute.attention,
        "compute_dtype": compute.dtype,
        "trust_remote_code": config.model.trust_remote_code,
    }
    return loaded(
        compute,
        lambda device: load_reward_model(path, seed=config.run.seed, device=device, **options),
        lambda: model_without_weights(
            path, reward=True, dtype=torch.float32, device=compute.device, **options
        ),
    )


def is_skeleton(model: Any) -> bool:
    """Whether the model has no weights yet, being another rank's to read."""
    return any(p.is_meta for p in model.parameters())


def ready_for_training(model: Any, config: AnyConfig) -> Any:
    """The model with its activations checkpointed and its layers compiled, if that is asked for."""
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    if config.train.compile:
        compile_layers(model)
    return model


def checkpoint_activations(model: Any) -> None:
    """Has each layer's activations computed again in the backward."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # dropout is 0; transformers checkpoints only in this mode


def base_dtype(config: ModelConfig, compute: Compute) -> torch.dtype:
    """Of the weights under an adapter; where all are trained they are float32.

    Raises:
        ValueError: an adapter on an adapter, or a precision that does not go with the run's.
    """
    lora = config.lora
    if lora.rank and adapter_base(config.path) is not None:
        raise ValueError(
            f"model.path: {config.path} is an adapter, on which peft puts no other; merge it first "
            "(fastalign merge), and train on the result"
        )
    if lora.base == "bf16" and compute.dtype != torch.bfloat16:
        raise ValueError(
            "model.lora.base: a bf16 base computes in bf16; expected --train.precision bf16 with "
            f"it, got {str(compute.dtype).removeprefix('torch.')}"
        )
    return torch.float32 if lora.base == "float32" else compute.dtype


def add_new_adapter(model: Any, config: ModelConfig) -> None:
    """Puts the adapter that the settings describe on a model, if they do."""
    lora = config.lora
    if lora.rank:
        add_adapter(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            use_rslora=lora.use_rslora,
        )


def load_model(
    path: str,
    config: ModelConfig,
    compute: Compute,
    *,
    dtype: torch.dtype = torch.float32,
    nf4: bool = False,
) -> tuple[Any, Tokenizer]:
    """A causal model, which the caller shares among the ranks, and the tokenizer beside it.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "packing": compute.packing,
        "attention_name": compute.attention,
        "compute_dtype": compute.dtype,
        "trust_remote_code": config.trust_remote_code,
    }
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    model = loaded(
        compute,
        lambda device: load_policy(path, device=device, nf4=nf4, **options),
        lambda: model_without_weights(path, reward=False, device=compute.device, **options),
    )
    check_vocabulary(model, tokenizer, path)
    print(f"attention of {path}: {attention_of(model)}", flush=True)
    return model, tokenizer


def check_vocabulary(model: Any, tokenizer: Tokenizer, path: str) -> None:
    """Refuses a tokenizer that has more tokens than the model.

    Raises:
        ValueError: naming the folder.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"model.path: the tokenizer in {path} has {len(tokenizer)} tokens, the model {num_rows}"
        )


def check_lengths(model: Any, data: TokenizedDataset) -> None:
    """Refuses data longer than the model's positions; says what was left out of the data.

    Raises:
        ValueError: see `check_positions`.
    """
    line = data.report.losses_line()
    if line is not None:
        print(line, flush=True)
    for fault in data.report.faults[:5]:
        print(f"skipped: {fault}", flush=True)
    check_positions(model, data)


def check_positions(model: Any, data: TokenizedDataset) -> None:
    """Refuses data longer than the model's positions.

    Raises:
        ValueError: naming the first row that is too long.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for group, source in zip(data.groups, data.sources, strict=True):
        longest = len(group.prompt_ids) + max(len(ids) for ids in group.response_ids)
        if longest > limit:
            raise ValueError(
                f"{source}: {longest} tokens, but the model has {limit} positions; lower "
                "--data.max-length and say what to do with such rows (--data.on-too-long)"
            )


def load_data(
    config: OnRows, source: str, tokenizer: Tokenizer, *, keep_ties: bool = False
) -> TokenizedDataset:
    """A source under the run's rules: demonstrations, or pairs; a loss with ties keeps them."""
    data = config.data
    if isinstance(config, SFTConfig):
        return load_sft(
            source,
            tokenizer,
            max_length=data.max_length,
            on_bad_row=data.on_bad_row,
            on_too_long=data.on_too_long,
        )
    return load_preferences(
        source,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        on_too_long=data.on_too_long,
        ties="keep" if keep_ties or config.loss.uses_ties else config.data.ties,
    )


def load_sets(
    config: OnRows, model: Any, tokenizer: Tokenizer
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training data, and held-out data if there are any, none longer than the model's positions.

    Raises:
        ValueError: whatever is wrong with a source, naming file and row.
        FileNotFoundError: a file that is not there.
    """
    sources = [config.data.train, *([] if config.data.eval is None else [config.data.eval])]
    sets = [load_data(config, source, tokenizer) for source in sources]
    for data in sets:
        check_lengths(model, data)
    return sets[0], sets[1] if len(sets) > 1 else None
