"""A step that does not fit ends in one line, and the run goes on with a smaller one."""

import json
import resource
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.cli.main import main
from fastalign.compute import is_out_of_memory, memory_used_in
from fastalign.runs import loop
from fastalign.runs.config import LoraConfig
from fastalign.runs.open import out_of_memory_in_one_line
from tests import rank_processes as ranks
from tests.small_runs import dpo_config, read_metrics, sft_config, write_rows

ROOM = 40 * 2**20


def limited(arguments: list[str]) -> None:
    """Run a command whose steps have little room.

    The limit is set as a step begins: what threads reserved before it differs from run to run.
    """
    begin = loop.Step.__init__

    def begin_limited(step: Any, run: Any) -> None:
        begin(step, run)
        lines = Path("/proc/self/status").read_text().splitlines()
        (size,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))

    loop.Step.__init__ = begin_limited  # type: ignore[method-assign]
    sys.exit(main(arguments))


def arguments(folder: Path, tokens: int, *more: str) -> list[str]:
    return [
        *("dpo", "--model.path", str(folder / "llama")),
        *("--data.train", str(folder / "pairs.jsonl"), "--run.dir", str(folder / "run")),
        *("--train.max-steps", "3", "--train.batch-size", "600", "--train.device", "cpu"),
        *("--train.tokens-per-batch", str(tokens), *more),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_step_that_does_not_fit_is_one_line_and_the_run_goes_on(folder: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join((lines * 600)[:600]))  # a step has each row once
    assert main(arguments(folder, 500, "--train.stop-at-step", "1")) == 0
    started = ranks.start(1, folder / "logs", limited, arguments(folder, 100_000, "--run.resume"))
    assert started.join() == [2]
    said = started.output(0)
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("fastalign dpo: "))
    assert line.startswith("fastalign dpo: out of memory in step 2, a batch of ")
    assert "lower --train.tokens-per-batch (now 100000), or add --train.gradient-checkpoint" in line
    assert "the bits of a run without a stop: train.tokens" in said
    assert main(arguments(folder, 400, "--run.resume")) == 0
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3]


def test_where_it_happened_is_told_from_the_outside_in(folder: Path) -> None:
    config = dpo_config(folder, "run", gradient_checkpointing=True, max_buffer_bytes=1000)
    expected = (
        r"^out of memory in step 7, a batch of 9 tokens; lower --train.tokens-per-batch "
        r"\(now 16384\), or lower --train.max-buffer-bytes \(now 1000\); fastalign estimate shows "
        r"what takes it. Nothing was trained yet: start again with the changed setting$"
    )
    with (
        pytest.raises(ValueError, match=expected),
        out_of_memory_in_one_line(config),
        memory_used_in("step 7"),
        memory_used_in("a batch of 9 tokens"),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_what_does_not_help_is_not_said(folder: Path) -> None:
    config = sft_config(folder, "run")
    for what, helps in (("step 7", True), ("the evaluation of step 7", False)):
        with (
            pytest.raises(ValueError, match=r"^out of memory in ") as caught,
            out_of_memory_in_one_line(config),
            memory_used_in(what),
        ):
            raise MemoryError
        assert ("--train.gradient-checkpointing" in str(caught.value)) is helps


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_a_model_that_does_not_fit_is_named(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def without_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", without_memory)
    assert main([command, *arguments(folder, 500)[1:]]) == 2
    assert capsys.readouterr().err.strip() == (
        f"fastalign {command}: out of memory in loading {folder / 'llama'}; take a smaller model, "
        "or share it among ranks by --parallel.strategy fsdp (now ddp); fastalign estimate shows "
        "what takes it. Nothing was trained yet: start again with the changed setting"
    )


@pytest.mark.parametrize("what", [None, "loading a model"])
def test_where_models_fill_it_batches_are_not_blamed(what: str | None, folder: Path) -> None:
    config = dpo_config(folder, "run")
    adapter = replace(config, model=replace(config.model, lora=LoraConfig(rank=4)))
    for run, base in ((config, False), (adapter, True)):
        with (
            pytest.raises(ValueError, match=r"^out of memory.*; take a smaller model") as caught,
            out_of_memory_in_one_line(run),
            nullcontext() if what is None else memory_used_in(what),
        ):
            raise MemoryError
        assert "--train." not in str(caught.value)
        assert ("--model.lora.base bf16 (now float32)" in str(caught.value)) is base


def test_commands_that_do_not_train_say_it_in_a_line_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> int:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "The"}])
        return main(
            [
                *("generate", "--model.path", str(folder / "llama"), "--data.prompts"),
                *(str(prompts), "--out", str(folder / "out.jsonl"), "--model.device", "cpu"),
            ]
        )

    for error in (
        torch.OutOfMemoryError("Tried to allocate 20.00 GiB\nand advice"),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
    ):
        assert fails(error) == 2
        first = str(error).splitlines()[0]
        assert capsys.readouterr().err.strip() == f"fastalign generate: out of memory: {first}"
    assert fails(RuntimeError("shapes differ")) == 2
    assert capsys.readouterr().err.strip().endswith("config.json says: RuntimeError: shapes differ")


def test_how_to_go_on_depends_on_what_was_saved(folder: Path) -> None:
    from fastalign.runs import loop
    from fastalign.trainers import train_sft

    def without_memory() -> str:
        with (
            pytest.raises(ValueError, match=r"^out of memory") as caught,
            out_of_memory_in_one_line(config),
        ):
            raise MemoryError
        return str(caught.value)

    config = sft_config(folder, "run", max_steps=2)
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Step", None)
        with pytest.raises(TypeError):
            train_sft(config)  # as the loop leaves the folder before its first step
    assert (run / "metrics.jsonl").stat().st_size == 0
    assert without_memory().endswith(
        "Nothing was trained yet: start again with the changed setting"
    )
    train_sft(config)
    assert "The run goes on from step-000002 with the changed setting, --run.resume" in (
        without_memory()
    )
    shutil.rmtree(run / "checkpoints")
    assert without_memory().endswith("start again with the changed setting, another --run.dir")
    with pytest.raises(ValueError, match=r"run.dir: .* holds another run"):
        train_sft(config)


def test_other_errors_pass(folder: Path) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    config = sft_config(folder, "run")
    with (
        pytest.raises(RuntimeError, match=r"^shapes differ$"),
        out_of_memory_in_one_line(config),
        memory_used_in("step 7"),
    ):
        raise RuntimeError("shapes differ")


def test_each_step_says_the_most_that_was_held(folder: Path) -> None:
    from fastalign.trainers import train_sft

    train_sft(sft_config(folder, "run", max_steps=2))
    first, second = read_metrics(folder / "run")
    assert 2**26 < first["peak_memory_bytes"] <= second["peak_memory_bytes"]
    assert json.dumps(first)
