"""The models that a run writes at its end: `model/`, of an adapter also `adapter/`, and others."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastalign.compute import Compute
from fastalign.data.readers.rows import is_on_hub
from fastalign.data.tokenizer import Tokenizer, eos_token_ids
from fastalign.data_sources import weighted_sources
from fastalign.in_memory import InMemory, model_of, origin
from fastalign.models.load import load_policy, load_reward_model, set_save_dtype
from fastalign.models.lora import has_adapter, merge_adapter
from fastalign.models.lora_files import (
    adapter_base,
    is_reward_adapter,
    open_adapter,
    save_adapter,
)
from fastalign.progress import in_notebook
from fastalign.ranks.parallel import is_sharded
from fastalign.ranks.world import World
from fastalign.report import model_card
from fastalign.report.end_of_run import EndOfRun, end_of_run
from fastalign.runs.config import TrainingConfig, settings_off_default
from fastalign.runs.folder import MAY_CHANGE, run_of
from fastalign.runs.metrics import METRICS
from fastalign.written_files import (
    ADAPTER_CONFIG,
    begin_folder,
    check_folder,
    check_not_among_data,
    finish_folder,
    input_paths,
)

# Name of each further folder to its model's base, and the function that writes it.
OtherFolders = Mapping[str, tuple[str, Callable[[Path], None]]]


def save_final_model(
    config: TrainingConfig,
    world: World,
    folder: Path,
    model: Any,
    tokenizer: Any,
    save_model: Callable[[Any, Any, Path], None],
    other_folders: OtherFolders,
    write_card: Callable[[Path, str, str], None],
) -> None:
    """Write a run's models, on rank 0; the other ranks give it their parts of the weights.

    An adapter is written first, as `adapter/`, and then merged into the model. `folder` is what the
    models' folders are written into; `save_model` writes (model, tokenizer, folder) in
    transformers' layout; `write_card` a card into (folder, its name, the base), on rank 0.
    """

    def complete(aside: Path, name: str, base: str = config.model.path) -> None:
        write_end_tokens(aside, tokenizer, config.model.path)
        write_card(aside, name, origin(base))

    for name, (base, write) in other_folders.items():
        with written(config, folder / name, world) as aside:
            write(aside)
            world.first_does(partial(complete, aside, name, base))
    if has_adapter(model):
        with written(config, folder / "adapter", world) as aside:
            save_adapter(model, aside)
            if world.is_first:
                tokenizer.save_pretrained(aside)
                complete(aside, "adapter", adapter_base(config.model.path) or config.model.path)
        if not config.model.lora.save_merged:
            return
        model = merged(model, folder / "adapter", config, world)
    with written(config, folder / "model", world) as aside:
        save_model(model, tokenizer, aside)
        world.first_does(partial(complete, aside, "model"))


def card_of_run(
    config: TrainingConfig,
    command: str,
    inputs: Mapping[str, Mapping[str, Any]],
    steps: tuple[int, int],
    best: tuple[int, float] | None,
    folder: Path,
    part: str,
    base: str,
) -> None:
    """Write the card of the model in `folder`, which becomes the run's folder `part`.

    `inputs` are the run's, as `fingerprints` returns them; `steps` those taken and all; `best` the
    step whose model it is, with the value of `train.best_metric`, where that chose it. Settings
    that a resumed run may change are left out.
    """
    usual = model_card.REWARD if command == "reward" else model_card.MODEL
    sources = weighted_sources(config.data.train)
    hashes = inputs.get("data", {})
    data = [
        (
            "training" if source.weight == 1 else f"training, weight {source.weight:g}",
            source.path,
            hashes.get("content") or hashes.get(source.path),
        )
        for source in sources
    ]
    if config.data.eval is not None:
        data.append(("held-out", config.data.eval, inputs.get("eval_data", {}).get("content")))
    left_out = MAY_CHANGE | {"model.path", "data.train"}
    changed = settings_off_default(config)
    chosen = [
        f"{name.removesuffix('.name')} {value}"
        for name, value in changed.items()
        if name.endswith(".name")
    ]
    facts = model_card.CardFacts(
        kind=model_card.VALUE if part == "value" else usual,
        adapter=(folder / ADAPTER_CONFIG).exists(),
        command=command,
        method=", ".join([str(type(config).__doc__).splitlines()[0].rstrip("."), *chosen]),
        base=base,
        data=data,
        hub_data=[each.path.partition(":")[0] for each in sources if is_on_hub(each.path)],
        settings={
            name: value
            for name, value in changed.items()
            if name not in left_out and not (name.startswith("vllm.") or name.endswith(".name"))
        },
        metrics=Path(config.run.dir) / METRICS,
        steps=steps if best is None else (best[0], steps[1]),
        chosen_by="" if best is None else f"{config.train.best_metric} ({best[1]:.6g})",
    )
    model_card.write_card(folder, facts)


def print_end(config: TrainingConfig, command: str, *, finished: bool) -> None:
    """Print a run's first and last numbers, and the commands to type next.

    There are no commands where the run was given objects. In a notebook nothing is printed: the
    result has the numbers.
    """
    if in_notebook():
        return
    folder, lora = Path(config.run.dir), config.model.lora
    reference, sampling = (getattr(config, name, None) for name in ("reference", "sampling"))
    changed = {} if sampling is None else settings_off_default(sampling)
    sources = weighted_sources(config.data.train)
    facts = EndOfRun(
        command=command,
        folder=folder,
        part="adapter" if lora.rank and not lora.save_merged else "model",
        finished=finished,
        base=config.model.path,
        reference=getattr(reference, "path", None) or config.model.path,
        train=sources[0].path,
        held_out=config.data.eval,
        samples=sampling is not None,
        sampling={
            f"sampling.{name.replace('_', '-')}": str(value)
            for name, value in changed.items()
            if name != "num_samples"
        },
        typed=not any(
            isinstance(value, InMemory)
            for value in (config.model.path, sources[0].path, config.data.eval)
        ),
    )
    for line in end_of_run(facts, folder / METRICS):
        print(line)


def write_end_tokens(folder: Path, tokenizer: Tokenizer, path: str | None = None) -> None:
    """Record in a model's files the tokens at which our samplers stop, and its pad token.

    Plain `generate` of transformers, and engines, then stop where training and sampling here did. A
    pad token that is there stays; one that also ends answers is recorded for generation alone,
    since transformers would not train the embedding of a model's pad token.

    `path` is the model's that the tokenizer belongs to; by default the tokenizer's own.
    """
    ends = eos_token_ids(tokenizer, path or tokenizer.name_or_path or None)
    pad = tokenizer.pad_token_id
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if not file.exists() and name == "config.json":  # an adapter has none
            continue
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        values["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        if values.get("pad_token_id") is None and (pad not in ends or name != "config.json"):
            values["pad_token_id"] = pad
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        file.write_text(text, encoding="utf-8")


def merged(model: Any, adapter: Path, config: TrainingConfig, world: World) -> Any:
    """Merge the adapter into the model; if it is sharded, rank 0 reads the whole model again."""
    if not is_sharded(model):
        merge_adapter(model)
        return model
    if not world.is_first:
        return None
    in_memory = model_of(config.model.path) is not None  # the adapter's files cannot name it
    load = load_reward_model if is_reward_adapter(adapter) else load_policy
    model = load(
        config.model.path if in_memory else adapter,
        Compute(packing="padded"),
        dtype=torch.float32 if config.model.lora.base == "float32" else torch.bfloat16,
        trust_remote_code=config.model.trust_remote_code,
    )
    if in_memory:
        open_adapter(model, adapter)
        merge_adapter(model)
    set_save_dtype(model, config.model.save_dtype)
    return model


def check_outputs(config: TrainingConfig, others: Collection[str] = ()) -> None:
    """Raise ValueError, before anything is loaded, if the run may not write what it will write.

    A folder holds what this run did not make, or is an input; `others` are the names of folders
    that the run writes beside the policy's.
    """
    setting, name = ("run.dir", config.run.dir)
    if config.run.export is not None:
        setting, name = ("run.export", config.run.export)
    folder, inputs = Path(name), input_paths(config)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{setting}: expected a folder, {folder} is a file")
    for read, path in inputs:
        if path == folder.resolve():
            raise ValueError(f"{setting}: {folder} is {read}, which is read; choose another folder")
    check_not_among_data(setting, folder, inputs)
    owner = run_of(Path(config.run.dir))
    inputs = [*inputs, ("run.dir", Path(config.run.dir).resolve())]
    names = ["adapter"] if config.model.lora.rank else []
    names += ["model"] if not config.model.lora.rank or config.model.lora.save_merged else []
    for part in (*names, *others):
        check_folder(
            setting, folder / part, owner=owner, overwrite=config.run.overwrite, inputs=inputs
        )


@contextmanager
def written(config: TrainingConfig, final: Path, world: World) -> Iterator[Path]:
    """Yield a folder for rank 0 to write into, which gets its final name when it is complete.

    Raises:
        ValueError: if something else took that name during the run, whose last step is saved.
    """
    owner = world.of_first(run_of(Path(config.run.dir)))
    aside = world.first_does(lambda: begin_folder(final, owner))

    def finish() -> None:
        setting = "run.dir" if config.run.export is None else "run.export"
        check_folder(setting, final, owner=owner, overwrite=config.run.overwrite)
        finish_folder(aside, final, owner)

    yield aside
    world.first_does(finish)
    print(f"{final.name} written to {final}")
