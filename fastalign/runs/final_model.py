"""The models that a run writes at its end: `model/`, of an adapter also `adapter/`, and others."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastalign.compute import Compute
from fastalign.models import has_adapter, load_policy, merge_adapter, save_adapter
from fastalign.ranks.parallel import is_sharded
from fastalign.ranks.world import World
from fastalign.runs.config import AnyConfig


def save_final_model(
    config: AnyConfig,
    world: World,
    folder: Path,
    model: Any,
    tokenizer: Any,
    save_model: Callable[[Any, Any, Path], None],
    other_folders: Mapping[str, Callable[[Path], None]],
) -> None:
    """Write a run's models, on rank 0; the other ranks give it their parts of the weights.

    An adapter is written first, as `adapter/`, and then merged into the model.

    Args:
        config: the run's settings.
        world: the ranks.
        folder: folder that the models' folders are written into.
        model: the policy, or the reward model.
        tokenizer: the tokenizer that is saved with it.
        save_model: writes (model, tokenizer, folder) in transformers' layout.
        other_folders: name of each further folder to the function that writes it.
    """
    for name, write in other_folders.items():
        with written(folder / name, world) as aside:
            write(aside)
    if has_adapter(model):
        with written(folder / "adapter", world) as aside:
            save_adapter(model, aside)
            if world.is_first:
                tokenizer.save_pretrained(aside)
        if not config.model.lora.save_merged:
            return
        model = merged(model, folder / "adapter", config, world)
    with written(folder / "model", world) as aside:
        save_model(model, tokenizer, aside)


def merged(model: Any, adapter: Path, config: AnyConfig, world: World) -> Any:
    """Merge the adapter into the model; if it is sharded, rank 0 reads the whole model again."""
    if not is_sharded(model):
        merge_adapter(model)
        return model
    if not world.is_first:
        return None
    lora = config.model.lora
    return load_policy(
        adapter,
        Compute(packing="padded"),
        dtype=torch.float32 if lora.base == "float32" else torch.bfloat16,
        trust_remote_code=config.model.trust_remote_code,
    )


@contextmanager
def written(final: Path, world: World) -> Iterator[Path]:
    """Yield a folder for rank 0 to write into, which gets its final name when it is complete."""
    aside = final.with_name(f".writing-{final.name}")

    def prepare() -> None:
        if aside.exists():  # left behind by a run that was killed
            shutil.rmtree(aside)

    def finish() -> None:
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)

    world.first_does(prepare)
    yield aside
    world.first_does(finish)
    print(f"{final.name} written to {final}", flush=True)
