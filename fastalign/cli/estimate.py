"""`fastalign estimate`: print the memory that a run will need before it is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import take_option
from fastalign.written_files import check_file, input_paths, write_file

if TYPE_CHECKING:
    import torch

    from fastalign.estimate.run import Estimate

ESTIMATED = {name: each for name, each in ALGORITHMS.items() if name != "online-dpo"}
MEBIBYTE = 2**20


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free for this process; None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    table, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text))
    return free


def table(found: Estimate) -> list[str]:
    """Return the lines of the table of the estimate by phase."""
    names = list(found.phases)
    head = "MiB" if found.ranks is None else f"MiB, each of {found.ranks} ranks"
    lines = [f"{head:34}" + "".join(f"{name:>22}" for name in names)]

    def row(label: str, of: Callable[[str], int]) -> None:
        if any(of(name) for name in names):
            lines.append(f"{label:34}" + "".join(f"{of(n) / MEBIBYTE:22,.0f}" for n in names))

    row("libraries, tokenizer, data", lambda name: found.libraries)
    row("weights", lambda name: found.phases[name].weights)
    row("gradients", lambda name: found.phases[name].gradients)
    row("AdamW's states", lambda name: found.phases[name].states)
    row("DDP's copy of gradients", lambda name: found.phases[name].buckets)
    row("gathered weights, at most", lambda name: found.phases[name].gathered)
    row("gradients to reduce, at most", lambda name: found.phases[name].reducing)
    row("copy for a checkpoint", lambda name: found.phases[name].saving)
    row("activations, logits, temporary", lambda name: found.phases[name].activations)
    row("kept by the allocator", lambda name: found.kept[name])
    row("peak", found.total_of)
    if found.host:
        lines.append(f"in host memory, for each rank: {found.host / MEBIBYTE:,.0f} MiB")
    return lines


def take_ranks(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return `--ranks`, of which less than 1 is a ValueError, or None; and the other flags."""
    text, rest = take_option(arguments, "--ranks")
    if text is None:
        return None, rest
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--ranks: expected a number of at least 1, got {text!r}")
    return int(text), rest


def estimated(config: Any, ranks: int | None) -> Estimate:
    """Estimate a run, by its configuration's class."""
    from fastalign.estimate.ppo import estimate_ppo  # heavy, as its neighbour
    from fastalign.estimate.run import estimate_run
    from fastalign.trainers.ppo.config import PolicyGradientConfig

    if isinstance(config, PolicyGradientConfig):
        return estimate_ppo(config, ranks)
    return estimate_run(config, ranks)


def remedies(config: Any, found: Estimate) -> Iterator[str]:
    """Yield a line for each setting that would save memory, which an estimate of its own finds."""
    train, ranks = config.train, found.ranks
    changes: list[tuple[str, Any]] = []
    if not train.gradient_checkpointing:
        changed = replace(config, train=replace(train, gradient_checkpointing=True))
        changes.append(("--train.gradient-checkpointing", changed))
    if found.num_tokens > 1:
        half = max(found.num_tokens // 2, 1)
        changed = replace(config, train=replace(train, tokens_per_batch=half))
        changes.append((f"--train.tokens-per-batch {half}", changed))
    if config.optim.states != "8bit" and (ranks is None or config.parallel.strategy != "fsdp"):
        changed = replace(config, optim=replace(config.optim, states="8bit"))
        changes.append(("--optim.states 8bit", changed))
    before = found.total_of(found.largest) - found.libraries
    for flag, changed in changes:
        again = estimated(changed, ranks)
        # This process grows from one estimate to the next, which is none of the setting's doing.
        saved = before - (again.total_of(again.largest) - again.libraries)
        if saved > 0:
            yield f"  {flag} would save {saved / MEBIBYTE:,.0f} MiB"


def as_record(found: Estimate) -> dict[str, Any]:
    """Return the estimate as a JSON object."""
    record: dict[str, Any] = {
        "peak_bytes": found.total_of(found.largest),
        "libraries_bytes": found.libraries,
        "phases": {
            phase: {f"{kind}_bytes": size for kind, size in vars(parts).items()}
            | {"kept_by_allocator_bytes": found.kept[phase]}
            for phase, parts in found.phases.items()
        },
    }
    if found.ranks is not None:
        batches = -(-found.num_batches // found.ranks)
        record |= {"ranks": found.ranks, "batches_of_a_rank": batches, "host_bytes": found.host}
    return record


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if the run fits and 1 if it does not."""
    output, arguments = take_option(argv, "--json")
    ranks, arguments = take_ranks(arguments)
    overwrite = "--overwrite" in arguments
    arguments = [word for word in arguments if word != "--overwrite"]
    name, *flags = arguments or ["nothing"]
    if name not in ESTIMATED:
        raise ValueError(f"expected one of {', '.join(ESTIMATED)}, got {name!r}")
    config = ESTIMATED[name].parse(flags)
    if output is not None:
        check_file("--json", output, overwrite=overwrite, inputs=input_paths(config))
    found = estimated(config, ranks)
    peak, free = found.total_of(found.largest), available_bytes(found.device)
    print(
        f"{name} of {config.model.path} on {found.device}: {found.num_parameters:,} parameters, "
        f"{found.num_trained:,} trained; largest batch {found.num_tokens:,} tokens, "
        f"{found.num_targets:,} predicted; at most {found.num_batches} batches a step"
    )
    print("\n".join(table(found)))
    fits = free is None or peak <= free
    if free is not None:
        what = "it" if ranks is None else "a rank"
        verdict = f"{what} fits" if fits else f"{what} does not fit"
        free_now = f"{free / MEBIBYTE:,.0f} MiB are free on {found.device}"
        print(f"{free_now}: {verdict}", flush=True)
    if not fits:
        for line in remedies(config, found):
            print(line, flush=True)
    if output is not None:
        record = {"algorithm": name, "available_bytes": free, **as_record(found)}
        write_file(Path(output), json.dumps(record, indent=1) + "\n", overwrite=overwrite)
    return 0 if fits else 1
