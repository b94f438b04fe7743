"""What every algorithm does before its first step: model, tokenizer, and whether they fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign.data import TokenizedDataset, Tokenizer, load_tokenizer
from fastalign.models import compile_layers, lm_head, load_policy
from fastalign.trainers.config import DPOConfig, ModelConfig, SFTConfig, config_to_dict
from fastalign.trainers.optimizer import adamw
from fastalign.trainers.run_folder import announce, locked, prepare_run_folder
from fastalign.trainers.state import seed_everything
from fastalign.trainers.step import Compute


@contextmanager
def opened_run(config: SFTConfig | DPOConfig) -> Iterator[None]:
    """Prepares and holds the run's folder, prints the resolved settings, seeds everything.

    Raises:
        ValueError: the folder holds another run, or is in use; or a library is missing.
    """
    adamw(config.optim.states)  # what is not installed is said before hours of work
    values = config_to_dict(config)
    folder = Path(config.run.dir)
    prepare_run_folder(folder, values, resume=config.run.resume)
    with locked(folder):
        announce(values)
        seed_everything(config.run.seed)
        yield


def load_for_training(config: SFTConfig | DPOConfig, compute: Compute) -> tuple[Any, Tokenizer]:
    """The policy with float32 master weights, and its tokenizer."""
    model, tokenizer = load_model(config.model.path, config.model, compute)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # dropout is 0; transformers checkpoints only in this mode
    if config.train.compile:
        compile_layers(model)
    return model, tokenizer


def load_model(path: str, config: ModelConfig, compute: Compute) -> tuple[Any, Tokenizer]:
    """A model on the device, and the tokenizer beside it.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    model = load_policy(
        path, device=compute.device, packing=compute.packing, trust_remote_code=trust
    )
    num_rows = lm_head(model).weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"model.path: the tokenizer in {path} has {len(tokenizer)} tokens, the model {num_rows}"
        )
    return model, tokenizer


def check_lengths(model: Any, data: TokenizedDataset) -> None:
    """Refuses data longer than the model's positions; says what was left out of the data.

    Raises:
        ValueError: naming the first row that is too long.
    """
    line = data.report.losses_line()
    if line is not None:
        print(line, flush=True)
    for fault in data.report.faults[:5]:
        print(f"skipped: {fault}", flush=True)
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
