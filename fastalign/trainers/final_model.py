"""What a run leaves behind: `model/`, of an adapter also `adapter/`, and what else it trained."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign.data import Tokenizer
from fastalign.models import has_adapter, merge_adapter, save_adapter
from fastalign.trainers.any_config import AnyConfig


def save_final_model(
    config: AnyConfig,
    model: Any,
    tokenizer: Tokenizer,
    save: Callable[[Any, Any, Path], None],
    others: Mapping[str, Callable[[Path], None]],
) -> None:
    """Writes the run's folders.

    Of an adapter `adapter/` comes first, which is merged into the model after that.

    Args:
        config: of the run.
        model: what was trained, or the policy among it.
        tokenizer: of the model.
        save: writes (model, tokenizer, folder) in transformers' layout.
        others: folder's name to what writes it.
    """
    folder = Path(config.run.dir)
    for name, write in others.items():
        with written(folder / name) as aside:
            write(aside)
    if has_adapter(model):
        with written(folder / "adapter") as aside:
            save_adapter(model, aside)
            tokenizer.save_pretrained(aside)
        if not config.model.lora.save_merged:
            return
        merge_adapter(model)
    with written(folder / "model") as aside:
        save(model, tokenizer, aside)


@contextmanager
def written(final: Path) -> Iterator[Path]:
    """A folder to write into: complete under another name first, then renamed."""
    aside = final.with_name(f".writing-{final.name}")
    if aside.exists():  # left behind by a run that was killed
        shutil.rmtree(aside)
    yield aside
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    print(f"{final.name} written to {final}", flush=True)
