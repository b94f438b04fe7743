"""What a run leaves behind: `model/`, of an adapter also `adapter/`, and what else it trained."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastalign.compute import Compute
from fastalign.models import has_adapter, load_policy, merge_adapter, save_adapter
from fastalign.ranks.parallel import is_sharded
from fastalign.ranks.world import World
from fastalign.runs.config import AnyConfig
from fastalign.runs.task import Task


def save_final_model(config: AnyConfig, model: Any, task: Task, folder: Path) -> None:
    """Writes what a run leaves behind, on rank 0; the others give it their parts of the weights.

    Of an adapter `adapter/` comes first, which is merged into the model after that.

    Args:
        config: of the run.
        model: what was trained, or the policy among it.
        task: what the algorithm gave the loop.
        folder: where to.
    """
    world, tokenizer = task.world, task.tokenizer
    for name, write in task.other_folders.items():
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
        task.save_model(model, tokenizer, aside)


def merged(model: Any, adapter: Path, config: AnyConfig, world: World) -> Any:
    """The model with its adapter merged; of a sharded one, rank 0 reads the whole of it again."""
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
    """A folder for rank 0 to write into: complete under another name first, then renamed."""
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
