"""What a command writes replaces nothing that it did not make: runs, commands, links, rights."""

import copy
import dataclasses
import importlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessor

from fastalign import trainers, written_files
from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import main
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from fastalign.runs.config import LoraConfig
from fastalign.runs.folder import commit_of
from fastalign.written_files import (
    MANIFEST,
    READ,
    check_file,
    check_folder,
    write_file,
    written_folder,
)
from tests.ranks.test_ranks import TRAINERS
from tests.small_runs import prompts_file, sft_config, words_reward, write_rows
from tests.tokenizers import CHATML, make_tokenizer

NOT_READ = {"dir", "export", "out", "cache_dir", "sync_folder", "device", "targets", "origin"} | {
    *("endpoint", "model", "key_variable", "host", "url", "trainer_host"),
    *("columns", "repo", "revision", "best_metric", "project", "name", "class_weights"),
}
MODULES = ("settings", "report", "models", "data")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def configurations() -> Iterator[Any]:
    for algorithm in ALGORITHMS.values():
        yield getattr(trainers, algorithm.config)
    for name in MODULES:
        module = importlib.import_module(f"fastalign.cli.{name}")
        for value in vars(module).values():
            if dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield value


def text_settings(config: Any) -> Iterator[str]:
    for entry in dataclasses.fields(config):
        if dataclasses.is_dataclass(entry.type):
            yield from text_settings(entry.type)
        elif "str" in str(entry.type):
            yield entry.name


def test_every_setting_that_is_a_text_is_known_to_name_a_file_or_not() -> None:
    found = {name for config in configurations() for name in text_settings(config)}
    assert found - READ - NOT_READ == set()
    assert not READ & NOT_READ


@pytest.mark.parametrize("there", ["a base", "a package", "a file", "a link to a folder"])
def test_a_run_replaces_no_folder_that_it_did_not_make(folder: Path, there: str) -> None:
    home = folder / "home"
    home.mkdir()
    config = sft_config(folder, "home", max_steps=1)
    if there == "a base":
        shutil.copytree(folder / "llama", home / "model")
        config = replace(config, model=replace(config.model, path=str(home / "model")))
    elif there == "a file":
        (home / "model").write_text("notes")
    else:
        place = home / "model" if there == "a package" else folder / "elsewhere"
        place.mkdir()
        (place / "__init__.py").write_text("x = 1")
        if there != "a package":
            (home / "model").symlink_to(place)
    before = contents(folder)
    expected = "expected a folder" if there == "a file" else "this run did not make it"
    with pytest.raises(ValueError, match=rf"^run\.dir: .*{expected}"):
        trainers.train_sft(config)
    assert contents(folder) == before  # nor did it begin


@pytest.mark.parametrize(
    ("trainer", "name"),
    [("ppo", "value"), ("reward", "eval"), ("online-dpo", "model"), ("lora", "adapter")],
)
def test_each_folder_of_a_run_is_looked_at_before_it_begins(
    folder: Path, trainer: str, name: str
) -> None:
    make, train = TRAINERS["dpo" if trainer == "lora" else trainer]
    config = make(folder, "run", max_steps=1)
    if trainer == "lora":
        config = replace(config, model=replace(config.model, lora=LoraConfig(rank=2)))
    (folder / "run" / name).mkdir(parents=True)
    (folder / "run" / name / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"^run\.dir: .*run/{name} exists"):
        train(config)
    assert list(contents(folder / "run")) == [f"{name}/notes.txt"]
    (folder / "run" / name / "notes.txt").unlink()
    train(config)
    if trainer != "reward":
        return
    before = contents(folder / "run/eval")
    train(make(folder, "run", max_steps=1, resume=True))  # writes them again
    assert contents(folder / "run/eval") == before


@pytest.mark.parametrize("trainer", ["sft", "ppo", "reward", "lora"])
def test_an_export_replaces_its_own_and_nothing_else(folder: Path, trainer: str) -> None:
    make, train = TRAINERS["dpo" if trainer == "lora" else trainer]
    config = make(folder, "run", stop_at_step=1)
    if trainer == "lora":
        config = replace(config, model=replace(config.model, lora=LoraConfig(rank=2)))
    train(config)
    out = folder / "out"
    run = replace(config.run, resume=True, export=str(out))
    config = replace(config, run=run)
    names = {"ppo": ["model", "value"], "lora": ["model", "adapter"]}.get(trainer, ["model"])
    for _ in range(2):  # the second one replaces what the first one made
        train(config)
        assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        (out / name / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=rf"out/{name} .*notes.txt was added"):
            train(config)
        (out / name / "notes.txt").unlink()
        changed = next((out / name).glob("*.safetensors"))
        whole = changed.read_bytes()
        changed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{changed.name} was changed since"):
            train(config)
        changed.write_bytes(whole)
    train(replace(config, run=replace(run, dir=str(folder / "run"))))
    (out / names[0] / "notes.txt").write_text("mine")
    train(replace(config, run=replace(run, overwrite=True)))
    assert not (out / names[0] / "notes.txt").exists()


def test_two_runs_do_not_replace_each_others_exports(folder: Path) -> None:
    for name in ("one", "two"):
        trainers.train_sft(sft_config(folder, name, stop_at_step=1))
    for name in ("one", "two"):
        config = sft_config(folder, name, resume=True)
        config = replace(config, run=replace(config.run, export=str(folder / "out")))
        if name == "one":
            trainers.train_sft(config)
            before = contents(folder / "out")
        else:
            with pytest.raises(ValueError, match=r"^run\.export: .*this run did not make it"):
                trainers.train_sft(config)
    assert contents(folder / "out") == before


def test_overwrite_never_replaces_an_input_or_the_run(folder: Path) -> None:
    (folder / "runs").mkdir()
    shutil.copytree(folder / "llama", folder / "runs/model/base")
    config = sft_config(folder, "runs", stop_at_step=1)
    config = replace(config, model=replace(config.model, path=str(folder / "runs/model/base")))
    with pytest.raises(ValueError, match=r"holds model\.path"):
        trainers.train_sft(replace(config, run=replace(config.run, overwrite=True)))
    config = sft_config(folder, "all/model", stop_at_step=1)
    trainers.train_sft(config)
    before = contents(folder / "all")
    run = replace(config.run, resume=True, overwrite=True, export=str(folder / "all"))
    with pytest.raises(ValueError, match=r"is or holds run\.dir"):
        trainers.train_sft(replace(config, run=run))
    assert contents(folder / "all") == before


@pytest.mark.parametrize("name", ["config.yaml", "machine.json", "checkpoints/mine", "profile/a"])
def test_a_new_run_writes_to_no_file_that_no_run_made(folder: Path, name: str) -> None:
    file = folder / "home" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine: 1")
    with pytest.raises(ValueError, match=r"no run of fastalign made it"):
        trainers.train_sft(sft_config(folder, "home", max_steps=1))
    assert file.read_text() == "mine: 1"


def test_what_a_killed_run_had_half_written_goes_when_the_run_goes_on(folder: Path) -> None:
    trainers.train_sft(sft_config(folder, "run", stop_at_step=1))
    for name in ("machine.json", "config.yaml", "began.txt"):
        (folder / "run" / f".{name}.123").write_text("ha")
    trainers.train_sft(sft_config(folder, "run", stop_at_step=2, resume=True))
    assert [path.name for path in (folder / "run").glob(".*")] == [".lock"]


def test_a_run_that_never_took_a_step_is_begun_again(folder: Path) -> None:
    config = sft_config(folder, "run", max_steps=1)
    with pytest.raises(FileNotFoundError):
        trainers.train_sft(replace(config, data=replace(config.data, train="nowhere.jsonl")))
    assert (folder / "run/config.yaml").exists()
    assert trainers.train_sft(config).finished


@pytest.mark.parametrize("where", ["data", "data/run", "data/deep/run"])
def test_a_run_does_not_write_into_its_data(folder: Path, where: str) -> None:
    (folder / "data").mkdir()
    shutil.move(folder / "texts.jsonl", folder / "data/texts.jsonl")
    config = sft_config(folder, where, max_steps=1)
    config = replace(config, data=replace(config.data, train=str(folder / "data"), eval=None))
    with pytest.raises(ValueError, match=r"^run\.dir: .*data\.train"):
        trainers.train_sft(config)
    assert list(contents(folder / "data")) == ["texts.jsonl"]


def test_a_run_does_not_write_into_its_models_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^run\.dir: .* is model\.path, which is read"):
        trainers.train_sft(sft_config(folder, "llama", max_steps=1))


def test_a_folder_that_appears_during_a_run_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = written_files.finish_folder

    def late(aside: Path, final: Path, owner: str | None) -> None:
        raise AssertionError("not reached")

    def begin(final: Path, owner: str | None) -> Path:
        final.mkdir()
        (final / "notes.txt").write_text("mine")
        return written_files.begin_folder(final, owner)

    final_model = importlib.import_module("fastalign.runs.final_model")
    monkeypatch.setattr(final_model, "begin_folder", begin)
    monkeypatch.setattr(final_model, "finish_folder", late)
    config = sft_config(folder, "run", max_steps=1)
    with pytest.raises(ValueError, match="this run did not make it"):
        trainers.train_sft(config)
    monkeypatch.setattr(final_model, "finish_folder", plain)
    monkeypatch.setattr(final_model, "begin_folder", written_files.begin_folder)
    assert (folder / "run/model/notes.txt").read_text() == "mine"
    run = replace(config.run, resume=True, export=str(folder / "out"))
    trainers.train_sft(replace(config, run=run))  # nothing is lost
    assert (folder / "out/model/model.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_model_is_on_the_disk_with_ordinary_rights_before_it_has_its_name(
    folder: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(written_files, "sync", lambda path: synced.append(path))
    before = os.umask(umask)
    try:
        trainers.train_sft(sft_config(folder, "run", max_steps=1))
    finally:
        os.umask(before)
    model = folder / "run/model"
    rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in model.iterdir()}
    assert set(rights.values()) == {0o666 & ~umask}, rights
    aside = {path.name for path in synced if path.parent.name.startswith(".writing-model")}
    assert aside == set(rights)
    assert [path for path in synced if path.name.startswith(".writing-model")]
    assert synced[-1] == model.parent
    assert set(json.loads((model / MANIFEST).read_text())["files"]) == set(rights) - {MANIFEST}


@pytest.mark.parametrize("there", ["an empty folder", "nothing yet"])
def test_a_link_in_place_of_the_model_is_followed(folder: Path, there: str) -> None:
    disk = folder / "disk"
    disk.mkdir()
    if there == "an empty folder":
        (disk / "big").mkdir()
    (folder / "run").mkdir()
    (folder / "run/model").symlink_to(disk / "big")
    assert trainers.train_sft(sft_config(folder, "run", max_steps=1)).finished
    assert (folder / "run/model").is_symlink()
    assert (disk / "big/model.safetensors").exists()


def test_a_folder_that_a_command_could_not_finish_leaves_what_was_there(tmp_path: Path) -> None:
    def fill(name: str) -> None:
        with written_folder(tmp_path / "out") as aside:
            aside.mkdir()
            (aside / name).write_text("x")
            if name == "broken":
                raise OSError("full")

    fill("first")
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        check_folder("out", tmp_path / "out")
    with pytest.raises(OSError, match="full"):
        fill("broken")
    assert sorted(contents(tmp_path)) == [f"out/{MANIFEST}", "out/first"]
    check_folder("out", tmp_path / "out", overwrite=True)
    inputs = [("data.train", tmp_path / "out/first")]
    with pytest.raises(ValueError, match=r"is or holds data\.train"):
        check_folder("out", tmp_path / "out", overwrite=True, inputs=inputs)


def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").write_text("mine")
    for name in (".", "..", "/"):
        with pytest.raises(ValueError, match="is not replaced"):
            check_folder("out", Path(name), overwrite=True)


def to_a_link(path: Path) -> None:
    path.with_name("real").write_text("mine")
    path.symlink_to("real")


def to_nowhere(path: Path) -> None:
    path.symlink_to("real")


FILES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a file": (lambda path: path.write_text("mine"), True),
    "an empty file": (lambda path: path.touch(), True),
    "a link to a file": (to_a_link, True),
    "a link that leads nowhere": (to_nowhere, False),
    "nothing": (lambda path: None, False),
}


@pytest.mark.parametrize("there", FILES)
def test_a_file_is_replaced_only_when_that_was_said(tmp_path: Path, there: str) -> None:
    path = tmp_path / "out.json"
    make, exists = FILES[there]
    make(path)
    if exists:
        with pytest.raises(ValueError, match=r"^out: .*out.json exists; --overwrite replaces it"):
            check_file("out", path, overwrite=False)
    write_file(check_file("out", path, overwrite=exists), "new", overwrite=exists)
    assert path.read_text() == "new"
    assert path.is_symlink() == there.startswith("a link")
    if path.is_symlink():
        assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("in.jsonl", "is data.samples, which is read"),
        ("link.jsonl", "is data.samples, which is read"),
        ("hard.jsonl", "is data.samples, which is read"),
        ("data/out.jsonl", "is in data.train"),
        ("data/deep/out.jsonl", "is in data.train"),
        ("data", "expected a file, .* is a folder"),
        ("in.jsonl/out", "in.jsonl is a file"),
    ],
)
def test_an_input_is_never_written_to(tmp_path: Path, name: str, said: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("rows")
    (tmp_path / "data").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    os.link(source, tmp_path / "hard.jsonl")
    inputs = [("data.samples", source), ("data.train", tmp_path / "data")]
    with pytest.raises(ValueError, match=said):
        check_file("out", tmp_path / name, overwrite=True, inputs=inputs)
    assert source.read_text() == "rows"


def test_a_file_that_appears_meanwhile_stays_and_the_result_is_kept(tmp_path: Path) -> None:
    path = check_file("out", tmp_path / "out.json", overwrite=False)
    path.write_text("another's")
    with pytest.raises(ValueError, match="the result is in ") as caught:
        write_file(path, "new", overwrite=False)
    assert path.read_text() == "another's"
    assert Path(str(caught.value).rpartition(" ")[2]).read_text() == "new"


def test_a_device_is_written_to_and_stays_one() -> None:
    null = check_file("out", "/dev/null", overwrite=False)
    write_file(null, "gone", overwrite=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, pairs, prompts, samples and a reward, in the current folder."""
    monkeypatch.chdir(folder)
    trainers.train_sft(sft_config(folder, "run", max_steps=1))
    words_reward(folder)
    prompts_file(folder)
    rows = [{"prompt": "The", "completion": text} for text in (" good", " slow")]
    write_rows(folder / "samples.jsonl", rows)
    return folder


MODEL = [
    "--model.path",
    "llama",
    "--data.prompts",
    "prompts.jsonl",
    "--sampling.max-new-tokens",
    "2",
]
LABEL = ["label-by-reward", "--data.samples", "samples.jsonl", "--reward", "words.json"]
ESTIMATE = ["estimate", "sft", "--model.path", "llama", "--data.train", "texts.jsonl"]
BOTH = ["--model.samples", "samples.jsonl", "--baseline.samples", "samples.jsonl"]
WRITERS: dict[str, tuple[list[str], str, list[str]]] = {
    "generate": (["generate", *MODEL, "--out"], "new/out.jsonl", ["new/out.jsonl"]),
    "label-by-reward": ([*LABEL, "--out"], "out.jsonl", ["out.jsonl"]),
    "eval": (
        ["eval", *MODEL, "--reference.path", "llama", "--out"],
        "new/eval.json",
        ["new/eval.json", "new/samples.jsonl"],
    ),
    "win-rate": (
        ["win-rate", *BOTH, "--reward", "words.json", "--out"],
        "out.json",
        ["out.json", "out.verdicts.jsonl"],
    ),
    "report": (["report", "run", "--out"], "run/report.html", ["run/report.html"]),
    "frontier": (["frontier", "runs.jsonl", "--out"], "f.png", ["f.png", "f.table.json"]),
    "estimate": ([*ESTIMATE, "--run.dir", "x", "--json"], "memory.json", ["memory.json"]),
    "new-model": (
        ["new-model", "--data.train", "texts.jsonl", "--vocab-size", "300", "--out"],
        "base",
        ["base/notes.txt"],
    ),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_command_replaces_nothing_before_any_work(
    work: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, out, files = WRITERS[command]
    point = {"method": "sft", "strength": 1, "seed": 0, "run": "e.json"}
    (work / "e.json").write_text(json.dumps({"reward": 1.0, "kl": 0.1, "reward_se": 0, "kl_se": 0}))
    write_rows(work / "runs.jsonl", [point])
    for file in files:
        (work / file).parent.mkdir(exist_ok=True)
        (work / file).write_text("mine")
        before = contents(work)
        with monkeypatch.context() as patch:
            patch.setattr("transformers.AutoConfig.from_pretrained", None)  # nothing is loaded
            assert main([*arguments, out]) == 2
        said = capsys.readouterr().err
        assert " exists" in said
        assert "--overwrite" in said
        assert said.count("\n") == 1
        assert contents(work) == before
        (work / file).unlink()
    (work / files[0]).write_text("mine")
    assert main([*arguments, out, "--overwrite"]) == 0, capsys.readouterr().err
    for file in files:
        assert not (work / file).exists() or (work / file).read_bytes() != b"mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "run", "--out", "run/metrics.jsonl", "--overwrite"],
        ["frontier", "run", "--out", "run/model/model.safetensors", "--overwrite"],
        [*LABEL, "--out", "samples.jsonl", "--overwrite"],
        ["generate", *MODEL, "--out", "prompts.jsonl", "--overwrite"],
        [*ESTIMATE, "--run.dir", "x", "--json", "texts.jsonl", "--overwrite"],
        ["new-model", "--data.train", "texts.jsonl", "--out", ".", "--overwrite"],
        ["new-model", "--data.train", "run/model", "--out", "run", "--overwrite"],
        ["eval", *MODEL, "--reference.path", "llama", "--out", "samples.jsonl"],
    ],
    ids=lambda words: f"{words[0]}-{words[2]}-{words[-2]}",
)
def test_what_a_command_reads_is_never_replaced(
    work: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(work)
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(work) == before


@pytest.mark.parametrize("trainer", ["sft", "ppo", "reward", "lora", "export"])
def test_every_model_that_is_written_stops_where_our_sampler_stops(
    folder: Path, trainer: str
) -> None:
    # The template ends turns with <|im_end|>, the tokenizer has </s> (2), as the base has.
    tokenizer = copy.copy(make_tokenizer())
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "llama")
    halve(folder / "llama")
    generation = json.loads((folder / "llama/generation_config.json").read_text())
    (folder / "llama/generation_config.json").write_text(
        json.dumps({**generation, "eos_token_id": [2, 3], "pad_token_id": None})
    )
    make, train = TRAINERS[{"lora": "dpo", "export": "sft"}.get(trainer, trainer)]
    config = make(folder, "run", max_steps=1)
    if trainer == "lora":
        config = replace(config, model=replace(config.model, lora=LoraConfig(rank=2)))
    train(config)
    out = folder / "run"
    if trainer == "export":
        out = folder / "out"
        run = replace(config.run, resume=True, export=str(out))
        train(replace(config, run=run))
    if trainer == "lora":
        adapter = ["--model.path", str(out / "adapter"), "--out", str(folder / "run/merged")]
        assert main(["merge", *adapter]) == 0
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    names = {"ppo": ["model", "value"], "lora": ["model", "adapter", "merged"]}
    for name in names.get(trainer, ["model"]):
        for file in ("config.json", "generation_config.json"):
            if (name, file) == ("adapter", "config.json"):
                continue
            found = json.loads((out / name / file).read_text())
            assert found["eos_token_id"] == [2, 3, end], (name, file)
            assert found["pad_token_id"] is not None
        if name != "adapter":
            kept = load_file(out / name / "model.safetensors").values()
            assert {value.dtype for value in kept} == {torch.bfloat16}
            assert json.loads((out / name / "config.json").read_text())["dtype"] == "bfloat16"
        opened = load_tokenizer(out / name)
        assert opened.chat_template == CHATML
        assert eos_token_ids(opened, out / name) == (2, 3, end)
    if trainer in ("sft", "export"):
        model = AutoModelForCausalLM.from_pretrained(out / "model")
        model.get_output_embeddings().weight.data.zero_()
        inputs = torch.tensor([[5, 6, 7]])
        for stop in (2, 3, end, 9):
            bias = ToToken(stop)
            drawn = model.generate(inputs, max_new_tokens=4, logits_processor=[bias])
            assert drawn.shape[1] - 3 == (1 if stop in (2, 3, end) else 4)


def halve(folder: Path) -> None:
    """Store a model's weights in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    model.save_pretrained(folder)


class ToToken(LogitsProcessor):
    """Makes one token the only one that can be drawn."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


def test_a_run_knows_its_host_and_its_commit_of_fastalign(folder: Path, tmp_path: Path) -> None:
    trainers.train_sft(sft_config(folder, "run", max_steps=1))
    machine = json.loads((folder / "run/machine.json").read_text())
    assert machine["host"] == os.uname().nodename
    assert machine["commit"] == commit_of(Path(trainers.__file__).parents[2])
    git, commit = tmp_path / "checkout/.git", "0123456789" * 4
    assert commit_of(git.parent) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{commit}\n")
    assert commit_of(git.parent) == commit, "detached"
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(git.parent) is None, "no commit yet"
    other = commit[::-1]
    (git / "packed-refs").write_text(
        f"# pack-refs\n{other} refs/heads/main\n{commit} refs/heads/x\n"
    )
    assert commit_of(git.parent) == other
    (git / "refs/heads/main").write_text(f"{commit}\n")
    assert commit_of(git.parent) == commit, "newer than the packed one"
