"""The model card (`README.md` in Hugging Face's format) of a model that a run writes.

It holds no time, speed or memory, so a resumed run writes the card of one without a stop.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from fastalign.model_files import read_object
from fastalign.output import shown
from fastalign.report.runs import read_lines, short_path
from fastalign.written_files import ADAPTER_CONFIG

CARD = "README.md"
# Metrics that differ from call to call, and counts that say nothing about the model.
_NOT_SHOWN = re.compile(
    r"second|tokens_per_|peak|fill_rate|num_micro_batches|num_tokens|^(.*/)?eps$|^step$|^epoch$"
)
VALUE, REWARD, MODEL = "Value model", "Reward model", "Model"
NOTES = {
    REWARD: ("", "Its logit is the reward of a prompt with a response that ends in the EOS token."),
    VALUE: ("", "Its `score`, read at each token, is the return expected from there on."),
}
VERSIONS = ("fastalign", "torch", "transformers", "peft")
CAUSAL = "AutoModelForCausalLM"
# The class that opens other models, by the end of their architecture's name; and the hub's tasks.
CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
}
TASKS = {
    CAUSAL: "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts about a run that its models' cards state.

    Attributes:
        kind: VALUE, REWARD or MODEL.
        adapter: whether it is a LoRA adapter on `base`.
        command: the training command, such as dpo.
        method: the algorithm, in words.
        base: path or hub name of the model that training started from; empty for one that was made
            in memory.
        data: each source of data: its use ("training"), its path or hub name, its hash or None.
        hub_data: names of those data sets that are on the hub.
        settings: settings that differ from the defaults, by their names.
        metrics: the run's `metrics.jsonl`.
        steps: optimiser steps taken, and those of the whole run.
        chosen_by: metric and value by which the step was chosen; empty: it is the last.
    """

    kind: str
    adapter: bool
    command: str
    method: str
    base: str
    data: Sequence[tuple[str, str, str | None]]
    hub_data: list[str]
    settings: Mapping[str, Any]
    metrics: Path
    steps: tuple[int, int]
    chosen_by: str = ""

    @property
    def title(self) -> str:
        """The kind of model, in words."""
        if not self.adapter:
            return self.kind
        return "Adapter (LoRA)" if self.kind == MODEL else f"{self.kind} as an adapter (LoRA)"


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write the card of the model or adapter in `folder` beside it."""
    of_base = base_card(facts.base) if facts.base else {}
    on_hub = bool(facts.base) and not os.path.exists(os.path.expanduser(facts.base))
    auto = class_to_load(folder, facts.base)
    base = "a model that was made in memory"
    if facts.base:
        base = f"{code(facts.base)}{'' if on_hub else ', a folder where it was trained'}"
    named = of_base | ({"base_model": facts.base} if on_hub else {})
    step, num_steps = facts.steps
    licence = of_base.get("license_name") or of_base.get("license")
    sources = [
        (use, code(source), code(digest) if digest else "") for use, source, digest in facts.data
    ]
    settings = [(code(name), code(value)) for name, value in facts.settings.items()]
    ending = "" if step >= num_steps else ", exported before the run's end"
    ending = f", the best by {plain(facts.chosen_by)}" if facts.chosen_by else ending
    known = "not known; the terms of the base and of the data apply"
    text = f"""\
---
{metadata(facts, named, auto).to_yaml()}
---

# {facts.title} trained with fastalign {facts.command}

- Method: {plain(facts.method)}
- Base: {base}
- Steps: {step} of {num_steps}{ending}
- Licence: {known if licence is None else f"{plain(licence)}, that of the base"}

## Data

{table(("use", "source", "SHA-256 of the rows as tokens"), sources)}

## Metrics

{metric_tables(facts)}

## Settings that differ from the defaults

{table(("setting", "value"), settings) if settings else "None."}

## How to load it

{how_to_load(auto, facts)}

## Versions

{", ".join(f"{name} {version(name)}" for name in VERSIONS if facts.adapter or name != "peft")}
"""
    ModelCard(text, ignore_metadata_errors=True).save(folder / CARD)


def metadata(facts: CardFacts, named: Mapping[str, str], auto: str) -> ModelCardData:
    """Return a card's head for the hub; `named` has the entries that the base's card has too."""
    return ModelCardData(
        **named,  # type: ignore[arg-type]
        datasets=facts.hub_data or None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=TASKS[auto],
        tags=["fastalign", facts.command],
    )


def base_card(base: str) -> dict[str, Any]:
    """Return licence and base of the base's own card, if there is one here; nothing is fetched."""
    try:
        file: Any = Path(base).expanduser() / CARD
        if not file.parent.exists():
            file = try_to_load_from_cache(base, CARD)
        text = Path(file).read_text(encoding="utf-8")
        found = ModelCard(text, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # none, or a damaged one
        return {}
    names = ("license", "license_name", "license_link", "base_model")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def class_to_load(folder: Path, base: str) -> str:
    """Return the class of transformers that opens the model in a folder, or an adapter's base.

    A base that is a hub name is causal.
    """
    adapter, file = folder / ADAPTER_CONFIG, folder / "config.json"
    if adapter.exists():
        if read_object(adapter).get("task_type") == "SEQ_CLS":
            return CLASSES["ForSequenceClassification"]
        file = Path(base).expanduser() / "config.json"
    architecture = ""
    if file.exists():
        architecture = (read_object(file).get("architectures") or [""])[0]
    return next((name for end, name in CLASSES.items() if architecture.endswith(end)), CAUSAL)


def how_to_load(auto: str, facts: CardFacts) -> str:
    """Return the paragraph on loading a model by a class of transformers."""
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if facts.adapter:
        path = json.dumps(short_path(facts.base or "BASE"))
        labels = ", num_labels=1" if facts.kind in NOTES else ""
        lines.insert(0, "from peft import PeftModel")
        lines += [
            f"base = {auto}.from_pretrained({path}{labels})",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    else:
        lines.append(f'model = {auto}.from_pretrained("FOLDER")')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    head = "`FOLDER` is this folder, or the repository on the Hugging Face hub that has it."
    return "\n".join([head, "", "```python", *lines, "```", *NOTES.get(facts.kind, ())])


def metric_tables(facts: CardFacts) -> str:
    """Return the last held-out metrics and then those of the last step, up to the model's step."""
    held_out: Mapping[str, Any] = {}
    last: Mapping[str, Any] = {}
    try:
        for row in read_lines(facts.metrics):
            if isinstance(row.get("step"), int) and row["step"] <= facts.steps[0]:
                last = row
                if any(is_held_out(name) for name in row):
                    held_out = row
    except (OSError, ValueError):  # the model is worth more than its numbers
        return f"The run's {facts.metrics.name} could not be read."
    parts = []
    for title, shown_row, of_eval in (("held-out data", held_out, True), ("training", last, False)):
        values = [
            (code(name), plain(f"{value:.6g}" if isinstance(value, int | float) else value))
            for name, value in shown_row.items()
            if is_held_out(name) is of_eval and not _NOT_SHOWN.search(name)
        ]
        if values:
            parts.append(
                f"On {title}, at step {shown_row['step']}:\n\n{table(('metric', 'value'), values)}"
            )
    return "\n\n".join(parts) or "None were logged."


def is_held_out(name: str) -> bool:
    """Return whether a metric was measured on held-out data."""
    return name.startswith("eval_")


def code(value: Any) -> str:
    """Return a value as code in Markdown; of an absolute path the end alone is shown."""
    values = value if isinstance(value, list | tuple) else (value,)
    text = " ".join(short_path(v) if isinstance(v, str) else str(v) for v in values)
    return f"`{plain(text)}`"


def plain(value: Any) -> str:
    """Return a text on one line, without what Markdown or a terminal would take for its own."""
    text = " ".join(shown(str(value)).split())
    return text.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|" + "---|" * len(header), *others])
