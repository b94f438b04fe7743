"""`fastalign COMMAND`: find and run the command, and print a caller's mistake as one line.

A training command is a row of `ALGORITHMS`. Every other command is a function
`main(argv) -> exit code` of a module that is imported only when it is called, so that
`fastalign doctor` starts without loading transformers.
"""

import importlib
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.output import (
    give_up_unwritten,
    lossy_output,
    occupy_standard_descriptors,
    safe_output,
)
from fastalign.process import tune_process, waits_by_load
from fastalign.ranks.errors import RANK_FAILED, RankFailed, UserCodeFailed

SECONDS_FOR_RANK_0 = 3.0
# Each other command: its module, with the function if it is not `main`, and its line in the help.
MODULES: dict[str, tuple[str, str]] = {
    "preflight": ("fastalign.cli.preflight", "check that a run on several processes can start"),
    "estimate": ("fastalign.cli.estimate", "estimate the memory of a run before it is started"),
    "vllm-server": ("fastalign.cli.vllm_server", "start a vLLM server for training to sample from"),
    "generate": ("fastalign.cli.answers.generate", "sample completions for a file of prompts"),
    "score": ("fastalign.cli.answers.score", "score a file of answers with a reward model"),
    "label": ("fastalign.cli.answers.label", "make preference pairs from samples and a reward"),
    "eval": ("fastalign.cli.answers.evaluate", "measure accuracy on pairs, reward, KL of samples"),
    "win-rate": ("fastalign.cli.answers.win_rate", "measure how often a model's answers win"),
    "frontier": ("fastalign.cli.report:frontier", "plot reward against KL of many runs"),
    "report": ("fastalign.cli.report", "write one report.html for one or more run folders"),
    "data": ("fastalign.cli.data", "check a data file and list every fault by line"),
    "merge": ("fastalign.cli.models:merge", "merge an adapter into its base model"),
    "new-model": ("fastalign.cli.models:new_model", "make a tokenizer and a small random model"),
    "doctor": ("fastalign.cli.doctor", "list the usable backends, and why others are not"),
}
COMMANDS: dict[str, str] = {
    **{name: algorithm.summary for name, algorithm in ALGORITHMS.items()},
    **{name: summary for name, (_, summary) in MODULES.items()},
}
# Environment variables that libraries read on import; started processes inherit them.
QUIET = (
    "HF_HUB_DISABLE_PROGRESS_BARS",  # bars for small files hide the lines that matter
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "VLLM_NO_USAGE_STATS",
    "DISABLE_SAFETENSORS_CONVERSION",  # transformers would ask a service to convert old weights
)


def usage() -> str:
    """Return the text that `fastalign --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: fastalign COMMAND [--help]", "", *lines])


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit code: 0 done, 2 after a caller's mistake.

    An error in the user's own code is 1, and is printed with its traceback.
    """
    with safe_output():
        return run(argv)


def run(argv: Sequence[str]) -> int:
    """Run one command, as `main`, and print what it prints as it is."""
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
    except (ValueError, OSError, RankFailed, UserCodeFailed) as error:
        if os.environ.get("FASTALIGN_DEBUG"):
            raise
        code = RANK_FAILED
        if not isinstance(error, RankFailed):
            wait_for_rank_0()
            code = 2
        if isinstance(error, UserCodeFailed):
            print(error.trace, end="", file=sys.stderr)
            code = 1
        notes = getattr(error, "__notes__", [])  # on what is saved
        text = " ".join("; ".join([str(error), *notes]).split())
        print(f"fastalign {argv[0]}: {text}", file=sys.stderr)
        return code
    except (RuntimeError, MemoryError) as error:
        from fastalign.compute import is_out_of_memory  # heavy, and already imported by the command

        if os.environ.get("FASTALIGN_DEBUG") or not is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"fastalign {argv[0]}: out of memory: {first}", file=sys.stderr)
        return 2


def run_command(name: str, arguments: list[str]) -> int:
    """Import the command's module and run it; return its exit code."""
    if name in ALGORITHMS:
        return ALGORITHMS[name].run(arguments)
    module, _, function = MODULES[name][0].partition(":")
    return int(getattr(importlib.import_module(module), function or "main")(arguments))


def wait_for_rank_0() -> None:
    """Delay other ranks so that rank 0 alone prints a common error before `torchrun` ends them."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)


def console() -> None:
    """Run the `fastalign` script or `python -m fastalign`."""
    occupy_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a sample may not be encodable
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    trains = sys.argv[1:2] and sys.argv[1] in ALGORITHMS
    tuned = tune_process()
    with lossy_output() if trains else nullcontext(), safe_output(), waits_by_load(tuned):
        try:
            code = main(sys.argv[1:])
        except Exception:  # printed as Python would print it, but through the safe streams
            traceback.print_exc()
            code = 1
    if trains:
        give_up_unwritten()
    if code and "WORLD_SIZE" in os.environ:
        # Threads of a process group whose other ranks are gone may never end.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)
