"""`fastalign COMMAND`: find and run the command, and print a caller's mistake as one line.

A training command is a row of `ALGORITHMS`, every other command one of `MODULES`. Settings are
parsed before the code that uses them is imported, which takes seconds: `--help` and a wrong flag
are answered without torch, or, where a loss's parameters are flags, without transformers.
"""

import importlib
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.nearest import nearest
from fastalign.output import (
    give_up_unwritten,
    lossy_output,
    occupy_standard_descriptors,
    quiet_libraries,
    safe_output,
)
from fastalign.process import tune_process, waits_by_load
from fastalign.ranks.errors import RANK_FAILED, RankFailed, UserCodeFailed

SECONDS_FOR_RANK_0 = 3.0
UNREAD = 128 + signal.SIGPIPE  # a shell's exit code of what a closed pipe ended


class Command(NamedTuple):
    """A command that trains nothing.

    Attributes:
        summary: one line for `fastalign --help`.
        place: `module:function` that runs it and returns the exit code.
        settings: `module:class` of the settings that the function takes; where it takes the
            arguments themselves, `module:text` of its help.
    """

    summary: str
    place: str
    settings: str


_SETTINGS, _ANSWERS = "fastalign.cli.settings", "fastalign.cli.answers"
_COMPARE = "fastalign.cli.compare"
MODULES: dict[str, Command] = {
    "preflight": Command(
        "check that a run on several processes can start",
        "fastalign.cli.preflight:main",
        f"{_SETTINGS}:PREFLIGHT_USAGE",
    ),
    "estimate": Command(
        "estimate the memory of a run before it is started",
        "fastalign.cli.estimate:main",
        f"{_SETTINGS}:ESTIMATE_USAGE",
    ),
    "vllm-server": Command(
        "start a vLLM server for training to sample from",
        "fastalign.cli.vllm_server:main",
        f"{_SETTINGS}:VllmServerConfig",
    ),
    "generate": Command(
        "sample completions for a file of prompts",
        f"{_ANSWERS}.generate:main",
        f"{_SETTINGS}:GenerateConfig",
    ),
    "score": Command(
        "score a file of answers with a reward model",
        f"{_ANSWERS}.score:main",
        f"{_SETTINGS}:ScoreConfig",
    ),
    "label-by-reward": Command(
        "make preference pairs from samples and a reward",
        f"{_ANSWERS}.label_by_reward:main",
        f"{_SETTINGS}:LabelConfig",
    ),
    "eval": Command(
        "measure accuracy on pairs, reward, KL of samples",
        f"{_ANSWERS}.evaluate:main",
        f"{_SETTINGS}:EvalConfig",
    ),
    "win-rate": Command(
        "measure how often a model's answers win",
        f"{_ANSWERS}.win_rate:main",
        f"{_SETTINGS}:WinRateConfig",
    ),
    "compare": Command(
        "serve a page where people compare answers",
        f"{_COMPARE}.serve:main",
        f"{_COMPARE}.settings:CompareConfig",
    ),
    "compare export": Command(
        "write people's comparisons as rows to train on",
        f"{_COMPARE}.data:export",
        f"{_COMPARE}.settings:CompareExportConfig",
    ),
    "compare import": Command(
        "add comparisons that were made elsewhere",
        f"{_COMPARE}.data:import_",
        f"{_COMPARE}.settings:CompareImportConfig",
    ),
    "compare results": Command(
        "print agreement, biases and human win rates",
        f"{_COMPARE}.data:show_results",
        f"{_COMPARE}.settings:CompareResultsConfig",
    ),
    "chat": Command(
        "talk with a model, and compare its answers",
        f"{_COMPARE}.chat:main",
        f"{_COMPARE}.settings:ChatConfig",
    ),
    "frontier": Command(
        "plot reward against KL of many runs",
        "fastalign.cli.report:frontier",
        "fastalign.cli.report:FrontierConfig",
    ),
    "report": Command(
        "write one report.html for one or more run folders",
        "fastalign.cli.report:main",
        "fastalign.cli.report:ReportConfig",
    ),
    "data": Command(
        "check a data file and list every fault by line",
        "fastalign.cli.data:main",
        f"{_SETTINGS}:DATA_USAGE",
    ),
    "merge": Command(
        "merge an adapter into its base model",
        "fastalign.cli.models:merge",
        "fastalign.cli.models:MergeConfig",
    ),
    "push": Command(
        "send a written model to the Hugging Face hub",
        "fastalign.cli.push:main",
        f"{_SETTINGS}:PushConfig",
    ),
    "new-model": Command(
        "make a tokenizer and a small random model",
        "fastalign.cli.models:new_model",
        "fastalign.cli.models:NewModelConfig",
    ),
    "doctor": Command(
        "list the usable backends, and why others are not",
        "fastalign.cli.doctor:main",
        f"{_SETTINGS}:DoctorConfig",
    ),
}
COMMANDS: dict[str, str] = {
    **{name: algorithm.summary for name, algorithm in ALGORITHMS.items()},
    **{name: command.summary for name, command in MODULES.items()},
}
# Commands of an earlier version and of other libraries.
INSTEAD = {
    "label": "fastalign label-by-reward",
    "train": "fastalign sft",
    "finetune": "fastalign sft",
    "dr-grpo": "fastalign grpo --ppo.advantage dr_grpo",
    "dapo": "fastalign grpo --ppo.loss.clip-range-high 0.28",
    "gspo": "fastalign grpo --ppo.loss gspo",
    "cispo": "fastalign grpo --ppo.loss cispo",
    "cpo": "fastalign dpo --loss cpo",
    "reward-model": "fastalign reward",
    "evaluate": "fastalign eval",
    "simpo": "fastalign dpo --loss simpo",
    "orpo": "fastalign dpo --loss orpo",
    "ipo": "fastalign dpo --loss ipo_mean",
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
        print(f"fastalign: unknown command {argv[0]!r}; {known_commands(argv[0])}", file=sys.stderr)
        return 2
    for name in QUIET:
        os.environ.setdefault(name, "1")
    quiet_libraries()
    try:
        return run_command(argv[0], list(argv[1:]))
    except (ValueError, OSError, RankFailed, UserCodeFailed) as error:
        if os.environ.get("FASTALIGN_DEBUG") or is_of_unread_output(error):
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


def known_commands(name: str) -> str:
    """Return what to type in place of a command that does not exist."""
    like = nearest(name, COMMANDS)
    meant = INSTEAD.get(name.lower(), like and f"fastalign {like}")
    if meant:
        return f"type {meant} (all commands: fastalign --help)"
    return f"expected one of {', '.join(COMMANDS)}"


def run_command(name: str, arguments: list[str]) -> int:
    """Parse the command's settings, then import its code and run it; return its exit code."""
    if name in ALGORITHMS:
        return ALGORITHMS[name].run(arguments)
    if f"{name} {' '.join(arguments[:1])}" in MODULES:  # a subcommand
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    command = MODULES[name]
    settings = find(command.settings)
    if isinstance(settings, str):
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(settings)
            return 0 if arguments else 2
        return int(find(command.place)(arguments))
    from fastalign.cli.config_parse import parse_flags

    config = parse_flags(settings, arguments, f"fastalign {name}")
    return int(find(command.place)(config))


def find(place: str) -> Any:
    """Return what is at `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def is_of_unread_output(error: BaseException) -> bool:
    """Return whether an error says that nobody reads this process's output, as behind `| head`."""
    if not isinstance(error, BrokenPipeError):
        return False
    outputs = select.poll()
    outputs.register(1, 0)
    return any(event & select.POLLERR for _, event in outputs.poll(0))


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
        except Exception as error:
            unread = is_of_unread_output(error)
            if not unread:  # printed as Python would print it, but through the safe streams
                traceback.print_exc()
            code = UNREAD if unread else 1
    if trains or code == UNREAD:
        give_up_unwritten()
    if code and "WORLD_SIZE" in os.environ:
        # Threads of a process group whose other ranks are gone may never end.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)
