"""`fastalign COMMAND`: finds the command's module, and turns a caller's mistake into one line.

A training command is a row of `ALGORITHMS`; every other one is a module of this package with
`main(argv) -> exit code`. It is imported only when it is called, so `fastalign doctor` starts
without loading transformers.
"""

import importlib
import io
import os
import sys
import time
from collections.abc import Sequence

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.masking import masked
from fastalign.ranks.world import RANK_FAILED, RankFailed

SECONDS_OF_FIRST = 3.0
# Each other command: its module, with `main(argv) -> exit code`, and its line in the help.
MODULES: dict[str, tuple[str, str]] = {
    "preflight": ("fastalign.cli.preflight", "whether a run on several processes can start"),
    "estimate": ("fastalign.cli.estimate", "what a run will need in memory, before it is started"),
    "vllm-server": ("fastalign.cli.vllm_server", "start a vLLM server that training samples from"),
    "generate": ("fastalign.cli.answers.generate", "sample completions of a file of prompts"),
    "score": ("fastalign.cli.answers.score", "score a file of answers with a reward model"),
    "label": (
        "fastalign.cli.answers.label",
        "turn sampled completions into preference pairs by a reward",
    ),
    "eval": ("fastalign.cli.answers.evaluate", "accuracy on pairs; reward and KL of fresh samples"),
    "win-rate": ("fastalign.cli.answers.win_rate", "how often one model's answers beat another's"),
    "frontier": ("fastalign.cli.frontier", "reward against KL of many runs: a picture, a table"),
    "report": ("fastalign.cli.report", "write one report.html for one or more run folders"),
    "data": ("fastalign.cli.data", "check a data file: counts, lengths, every fault by line"),
    "merge": ("fastalign.cli.merge", "make one model of an adapter and its base"),
    "new-model": ("fastalign.cli.new_model", "make a tokenizer and a small model from scratch"),
    "doctor": ("fastalign.cli.doctor", "which backends are usable here, and why not"),
}
COMMANDS: dict[str, str] = {
    **{name: algorithm.summary for name, algorithm in ALGORITHMS.items()},
    **{name: summary for name, (_, summary) in MODULES.items()},
}
# Read by libraries when they are imported, and by processes that are started.
QUIET = (
    "HF_HUB_DISABLE_PROGRESS_BARS",  # bars for files of a megabyte hide the lines that matter
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "VLLM_NO_USAGE_STATS",
    "DISABLE_SAFETENSORS_CONVERSION",  # transformers would ask a service to convert old weights
)


def usage() -> str:
    """The text that `fastalign --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: fastalign COMMAND [--help]", "", *lines])


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit code: 0 done, 2 the caller's mistake, in one line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"fastalign {version('fastalign')}")
        return 0
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"fastalign: unknown command {argv[0]!r}; expected one of {known}", file=sys.stderr)
        return 2
    for name in QUIET:
        os.environ.setdefault(name, "1")
    try:
        return run_command(argv[0], list(argv[1:]))
    except (ValueError, OSError, RankFailed) as error:
        if os.environ.get("FASTALIGN_DEBUG"):
            raise
        if not isinstance(error, RankFailed):
            let_first_speak()
        text = " ".join(str(error).split())
        print(f"fastalign {argv[0]}: {masked(text)}", file=sys.stderr)
        return RANK_FAILED if isinstance(error, RankFailed) else 2
    except (RuntimeError, MemoryError) as error:
        from fastalign.models import is_out_of_memory  # heavy, and the command has it by now

        if os.environ.get("FASTALIGN_DEBUG") or not is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"fastalign {argv[0]}: out of memory: {masked(first)}", file=sys.stderr)
        return 2


def run_command(name: str, arguments: list[str]) -> int:
    """Import what the command needs, and run it; return its exit code."""
    if name in ALGORITHMS:
        return ALGORITHMS[name].run(arguments)
    return int(importlib.import_module(MODULES[name][0]).main(arguments))


def let_first_speak() -> None:
    """Has other ranks wait: what rank 0 finds wrong too is said once, and `torchrun` ends them."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_OF_FIRST)


def console() -> None:
    """Entry point of the `fastalign` script and of `python -m fastalign`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a sample may not fit the terminal
            stream.reconfigure(errors="backslashreplace")
    code = main(sys.argv[1:])
    if code and "WORLD_SIZE" in os.environ:
        # Threads of a process group whose other ranks are gone do not end in an orderly way.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
