"""YAML under flags, and one line for whatever is wrong with either."""

import contextlib
import itertools
import logging
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fastalign.cli.algorithms import ALGORITHMS, print_settings
from fastalign.cli.config_parse import parse_config
from fastalign.cli.flags import SHOWN, field_docs
from fastalign.cli.main import COMMANDS, main
from fastalign.output import NOISE, quiet_libraries
from fastalign.runs.config import (
    LoraConfig,
    ModelConfig,
    RunConfig,
    check_numbers,
    config_to_dict,
    settings_off_default,
)
from fastalign.trainers import LOSSES, REWARD_LOSSES, PPOConfig, PromptDataConfig, SFTConfig

parse_dpo, parse_reward = ALGORITHMS["dpo"].parse, ALGORITHMS["reward"].parse

BASE = ["--model.path", "m", "--data.train", "d.jsonl", "--run.dir", "r"]
YAML = """
model:
  path: m
data:
  train: d.jsonl
run:
  dir: r
optim:
  lr: 3e-5
  betas: [0.8, 0.9]
  grad_clip: 0.5
train:
  max_steps: null
  gradient_checkpointing: true
  tokens_per_batch: 77
loss:
  name: ipo_mean
  beta: 0.25
"""


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def test_the_file_gives_defaults_and_flags_override_them(tmp_path: Path) -> None:
    file = write(tmp_path, YAML)
    config = parse_dpo(["--config", file])
    assert (config.optim.lr, config.optim.betas, config.optim.grad_clip) == (3e-5, (0.8, 0.9), 0.5)
    assert config.train.max_steps is None
    assert config.train.gradient_checkpointing
    assert isinstance(config.loss, LOSSES["ipo_mean"])
    assert config.loss.beta == 0.25
    flags = ["--optim.lr=1e-3", "--optim.betas", "0.1", "0.2", "--train.no-gradient-checkpointing"]
    more = ["--train.max-steps", "9", "--train.tokens_per_batch", "5", "--loss.beta", "0.5"]
    config = parse_dpo([*flags, f"--config={file}", *more])
    assert (config.optim.lr, config.optim.betas, config.optim.grad_clip) == (1e-3, (0.1, 0.2), 0.5)
    assert not config.train.gradient_checkpointing
    assert (config.train.max_steps, config.train.tokens_per_batch) == (9, 5)
    assert isinstance(config.loss, LOSSES["ipo_mean"])
    assert config.loss.beta == 0.5


def test_the_file_has_a_third_level(tmp_path: Path) -> None:
    text = """
model:
  path: m
  lora:
    rank: 16
    targets: [q_proj, lm_head]
    save_merged: false
    use_rslora: true
"""
    file = write(tmp_path, text)
    rest = ["--data.train", "d.jsonl", "--run.dir", "r"]
    lora = parse_dpo(["--config", file, *rest]).model.lora
    assert lora == LoraConfig(
        rank=16, targets=("q_proj", "lm_head"), save_merged=False, use_rslora=True
    )
    flags = ["--model.lora.rank", "8", "--model.lora.targets", "all-linear"]
    more = ["--model.lora.no-use-rslora", "--model.lora.base=bf16", "--model.lora.alpha", "4"]
    config = parse_dpo(["--config", file, *rest, *flags, *more])
    assert config.model.lora == LoraConfig(8, 4.0, False, ("all-linear",), "bf16", False)
    values = config_to_dict(config)
    assert values["model"]["lora"]["targets"] == ["all-linear"]
    import yaml

    again = parse_dpo(["--config", write(tmp_path, yaml.safe_dump(values))])
    assert config_to_dict(again) == values
    assert parse_dpo(BASE).model.lora.rank == 0


def test_another_loss_puts_the_files_parameters_aside(tmp_path: Path) -> None:
    config = parse_dpo(["--config", write(tmp_path, YAML), "--loss", "simpo"])
    assert isinstance(config.loss, LOSSES["simpo"])
    assert config.loss.beta == 2.0


def test_settings_are_shown_where_they_are_not_the_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    three = {"model.path": "m", "data.train": "d.jsonl", "run.dir": "r"}
    sft = ALGORITHMS["sft"].parse([*BASE, "--optim.lr", "2e-5"])  # of sft, not of OptimConfig
    assert settings_off_default(sft) == three
    flags = ["--optim.lr", "1e-6", "--loss", "simpo", "--loss.gamma", "2", "--optim.eps", "1e-7"]
    found = settings_off_default(parse_dpo([*BASE, *flags]))
    assert found == {**three, "optim.eps": 1e-7, "loss.name": "simpo", "loss.gamma": 2.0}
    print_settings(parse_dpo([*BASE, "--model.lora.rank", "4", "--model.lora.targets", "a", "b"]))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  model.path: m",
        "  model.lora.rank: 4",
        "  model.lora.targets: a b",
        "  data.train: d.jsonl",
        "  run.dir: r",
        "  loss.name: dpo",
    ]


def test_the_saved_configuration_is_one_that_can_be_read(tmp_path: Path) -> None:
    import yaml

    config = parse_dpo([*BASE, "--loss", "dpo_rao_kupper", "--loss.nu", "2.5"])
    values = config_to_dict(config)
    parameters = {"beta": 0.1, "nu": 2.5, "nll_coefficient": 0.0}
    assert values["loss"] == {"name": "dpo_rao_kupper", **parameters}
    again = parse_dpo(["--config", write(tmp_path, yaml.safe_dump(values))])
    assert config_to_dict(again) == values


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_every_loss_of_a_reward_model_can_be_chosen_and_read_again(
    name: str, tmp_path: Path
) -> None:
    import yaml

    flags = ["--loss", name, "--loss.nu-lr" if name != "bradley_terry" else "--optim.lr", "0.5"]
    config = parse_reward([*BASE, *flags])
    assert type(config.loss) is REWARD_LOSSES[name]
    values = config_to_dict(config)
    assert values["loss"]["name"] == name
    again = parse_reward(["--config", write(tmp_path, yaml.safe_dump(values))])
    assert config_to_dict(again) == values
    assert parse_reward(BASE).loss == REWARD_LOSSES["bradley_terry"]()
    with pytest.raises(ValueError, match=r"--loss: expected one of bradley_terry, .*got 'dpo'"):
        parse_reward([*BASE, "--loss", "dpo"])
    with pytest.raises(ValueError, match=r"--loss\.nu"):
        parse_reward([*BASE, "--loss.nu", "2"])
    values["model"]["lora"]["rank"] = 8
    adapted = parse_reward(["--config", write(tmp_path, yaml.safe_dump(values))])
    assert adapted.model.lora == LoraConfig(8)
    given = parse_reward([*BASE, *flags, "--model.lora.rank", "8"])
    assert config_to_dict(given) == config_to_dict(adapted)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_chosen(name: str) -> None:
    loss = parse_dpo([*BASE, "--loss", name]).loss
    assert isinstance(loss, LOSSES[name])
    assert loss.formula().name == name
    made = loss.formula()
    assert {"nll_coefficient": made.nll_coefficient, **made.parameters} == asdict(loss)
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required, but not given: --model.path, --data.train, --run.dir \(see fastalign dpo"),
        (
            ["--modl.path", "m", *BASE[2:]],
            r": --modl.path: no such flag, type --model.path m \(",
        ),
        ([*BASE, "--model.path="], "model.path: expected a model folder or a hub name, got ''"),
        ([*BASE, "--loss", "nonsense"], "--loss: expected one of dpo, .*got 'nonsense'"),
        ([*BASE, "--loss"], "--loss: expected a value"),
        ([*BASE, "--loss.gamma", "1"], "--loss.gamma"),
        ([*BASE, "--loss.beta", "0"], "loss.beta: expected a finite number above 0"),
        ([*BASE, "--loss.beta", "nan"], "loss.beta: expected a finite number above 0"),
        ([*BASE, "--optim.lr", "fast"], "optim.lr"),
        ([*BASE, "--optim.lr", "-1"], "optim.lr: expected a finite number of at least 0"),
        ([*BASE, "--optim.learning-rate", "1"], "--optim.learning-rate"),
        ([*BASE, "--train.packing", "tight"], "train.packing"),
        ([*BASE, "--train.batch-size", "0"], "train.batch_size: expected at least 1, got 0"),
        ([*BASE, "--model.lora.rank", "-1"], "model.lora.rank: expected at least 0, got -1"),
        ([*BASE, "--model.lora.base", "nf4"], "model.lora.base: nf4 is a setting of an adapter"),
        ([*BASE, "--model.lora.rnk", "4"], "--model.lora.rnk"),
        ([*BASE, "--config", "none.yaml"], "--config: no such file: none.yaml"),
        ([*BASE, "--model.path", "./nowhere"], "nowhere"),
        ([*BASE, "--optim.eps", "inf"], "optim.eps: expected a finite number, got inf"),
        ([*BASE, "--loss", "simpo", "--loss.gamma", "inf"], "loss.gamma: expected a finite number"),
        ([*BASE, "--train.stall-seconds", "1e10"], "stall_seconds: expected at most 1e.09, got"),
        ([*BASE, "--run.seed", "9" * 30], "run.seed: expected a number of 64 bits"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastalign dpo: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "unknown key optim.lrr; expected one of lr, schedule"),
        ("optimiser:\n  lr: 1\n", "unknown section 'optimiser'; expected one of model, data"),
        ("optim: 3\n", "optim: expected keys and values, got 3"),
        ("optim:\n  lr: {a: 1}\n", "optim.lr: expected a value, got a mapping"),
        ("model:\n  lora: 16\n", "model.lora: expected keys and values, got 16"),
        ("model:\n  lora:\n    r: 1\n", "unknown key model.lora.r; expected one of rank, alpha"),
        ("model:\n  lora:\n    rank: {a: 1}\n", "model.lora.rank: expected a value, got a mapping"),
        ("- 1\n", "expected sections"),
        ("a: [\n", "not YAML"),
        ("\x00", "not YAML"),
        ("loss:\n  name: nonsense\n", "loss.name: expected one of"),
        ("loss:\n  name: dpo\n  gamma: 1\n", "unknown key loss.gamma; expected one of beta"),
        ("loss:\n  name: [dpo]\n", "loss.name: expected one of"),
        ("optim:\n  lr: 1\n  lr: 2\n", "each key once, got 'lr' twice"),
        ("optim:\n  lr: 1\noptim:\n  eps: 2\n", "each key once, got 'optim' twice"),
        ("train:\n  batch_size: 010\n", "expected a decimal number, or text in quotes, got 010"),
        ("train:\n  batch_size: 1:30\n", "a decimal number, or text in quotes, got 1:30"),
        ("train:\n  epochs: 1:30.5\n", "a decimal number, or text in quotes, got 1:30.5"),
        ("train:\n  batch_size: 0x10\n", "a decimal number, or text in quotes, got 0x10"),
        ("optim:\n  eps: .inf\n", "expected a finite number, or text in quotes, got .inf"),
        ("run:\n  seed: !!timestamp 2001-01-01\n", "not YAML"),
        ("run:\n  seed: !!bool 3\n", "not YAML"),
        ("run: " + "[" * 2000, "nested too deeply"),
        ("run: &a [*a]\n", "run: expected keys and values"),
        ("run:\n  dir: null\n", "run.dir: expected a value, got null"),
        ("data:\n  train: no\n", "data.train: expected no boolean, got false"),
        ("optim:\n  lr: [1]\n", "optim.lr: expected one value, got a list"),
        ("optim:\n  betas: [[0, 1], 0]\n", "optim.betas: expected a value, got a list in a list"),
        ("model:\n  path: --run.resume\n", "model.path: expected a value, got '--run.resume'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        parse_dpo(["--config", file, *BASE])
    assert message in str(caught.value)


def test_text_that_looks_like_a_number_is_kept(tmp_path: Path) -> None:
    text = (
        "run:\n  dir: 1.10\ndata:\n  train: 2024-01-02\n  eval: '010'\ntrain:\n  batch_size: 1_0\n"
    )
    config = parse_dpo(["--model.path", "m", "--config", write(tmp_path, text)])
    assert (config.run.dir, config.data.train, config.data.eval) == ("1.10", "2024-01-02", "010")
    assert config.train.batch_size == 10


def numbers_of(config: Any, prefix: str = "") -> Iterator[tuple[Any, Any, str, str]]:
    """Each dataclass with its fields that hold a float or an int: (owner, field, name, kind)."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from numbers_of(value, f"{prefix}{entry.name}.")
        for kind in ("float", "int"):
            if re.search(rf"\b{kind}\b", str(get_type_hints(type(config))[entry.name])):
                yield config, entry.name, f"{prefix}{entry.name}", kind


@pytest.mark.parametrize("command", ALGORITHMS)
def test_no_number_of_any_setting_is_infinite_or_overflows(command: str) -> None:
    algorithm = ALGORITHMS[command]
    rewards = ["--reward.sources", "r"] if algorithm.samples else []
    tables = [[(key, name) for name in algorithm.table(key)] for key in algorithm.choices]
    names: set[str] = set()
    for chosen in itertools.zip_longest(*tables) if tables else [()]:
        flags = [word for pair in chosen if pair for word in (f"--{pair[0]}", pair[1])]
        several = ["--sampling.num-samples", "4"] if rewards else []
        loss = ["--kl", "loss"] if "grpo" in flags and "loss" not in flags else []
        config = algorithm.parse([*BASE, *rewards, *several, *flags, *loss])
        for owner, field, name, kind in numbers_of(config):
            before, bad = getattr(owner, field), [2**63, -(2**63) - 1] if kind == "int" else []
            for value in [*bad, *([math.inf, -math.inf, math.nan] if kind == "float" else [])]:
                held = (*before, value) if isinstance(before, tuple) else value
                object.__setattr__(owner, field, held)
                with pytest.raises(ValueError, match=rf"^{name}: expected"):
                    check_numbers(config)
            object.__setattr__(owner, field, before)
            names.add(name)
        check_numbers(config)
    assert len(names) > 15


def test_every_command_parses_its_flags_in_one_place() -> None:
    root = Path(__file__).parents[2] / "fastalign"
    texts = {path: path.read_text() for path in root.rglob("*.py")}
    assert [path.name for path, text in texts.items() if "tyro.cli(" in text] == ["config_parse.py"]
    readers = [path.name for path, text in texts.items() if "yaml.safe_load" in text]
    assert readers == []


def test_sft_takes_the_same_settings_with_a_loss_of_its_own(tmp_path: Path) -> None:
    assert parse_config(SFTConfig, BASE, "fastalign sft").optim.lr == 2e-5
    with pytest.raises(ValueError, match="--loss"):
        parse_config(SFTConfig, [*BASE, "--loss", "dpo"], "fastalign sft")
    message = r"unknown key loss\.name; expected one of label_smoothing, z_coefficient"
    with pytest.raises(ValueError, match=message):
        parse_config(SFTConfig, ["--config", write(tmp_path, YAML)], "fastalign sft")


def test_the_shipped_recipes_are_read() -> None:
    recipes = Path(__file__).parents[2] / "scripts/recipes"
    assert parse_dpo(["--config", str(recipes / "dpo.yaml"), *BASE]).optim.warmup_steps == 20
    config = parse_config(SFTConfig, ["--config", str(recipes / "sft.yaml"), *BASE], "sft")
    assert config.optim.schedule == "cosine"
    reward = parse_reward(["--config", str(recipes / "reward.yaml"), *BASE])
    assert reward.loss == REWARD_LOSSES["bradley_terry"](centring_coefficient=0.01)


@pytest.mark.parametrize("arguments", [["nonsense"], []])
def test_an_unknown_command_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "dpo" in out + err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == main(["--help"]) == 0
    assert "fastalign 0." in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_help_is_read_in_sentences(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse_config(PPOConfig, ["--help-all"], "fastalign ppo")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.replace("│", " ").split())
    for flag in ("--model.path", "--data.train", "--run.dir", "--reward.sources"):
        assert re.search(rf"{flag} [^()]*(\([^()]*\)[^()]*)*\(required\)", words)
    assert (
        "--reference.path {None}|STR Folder or hub name; by default the model that training"
        in words
    )
    assert not re.search(r"default: (None|''|\)|\(\))", words)
    for section in (ModelConfig, PromptDataConfig, RunConfig, PPOConfig):
        docs = field_docs(section)
        own = [f.name for f in fields(section) if not is_dataclass(f.type)]
        assert set(own) <= set(docs)
        for doc in docs.values():
            assert doc in words


def test_the_short_help_is_the_flags_that_matter_by_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, algorithm in ALGORITHMS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) < 60
        assert max(map(len, lines)) <= 80
        flags = [line for line in lines if line.startswith("--")]
        assert len(flags) == SHOWN
        assert lines[-1] == f"All flags: fastalign {command} --help-all"
        algorithm.parse(" ".join(flags).split())  # the examples are values that fit


MISTAKES = [  # a command line, and what its one line says to type instead
    ("dop --model.path m", "type fastalign dpo"),
    ("label --out o", "type fastalign label-by-reward"),
    ("dr-grpo", "type fastalign grpo --ppo.advantage dr_grpo"),
    (
        "dpo --model my-model --data d.jsonl",
        "--model: no such flag, type --model.path my-model; --data: no such flag, type "
        "--data.train d.jsonl; required, but not given: --run.dir (",
    ),
    (
        "sft --model_name_or_path m --dataset_name=d --output-dir r --learning_rate 1e-4",
        "type --model.path m; --dataset_name: no such flag, type --data.train d; --output-dir: no "
        "such flag, type --run.dir r; --learning_rate: no such flag, type --optim.lr 1e-4 (",
    ),
    ("ppo", "not given: --model.path, --data.train, --run.dir, --reward.sources (see"),
    ("ppo {BASE} --reward.sources r --beta 0.1", "--beta: no such flag, type --kl.coefficient 0.1"),
    ("dpo {BASE} --loss dop_hinge", "(did you mean hinge?)"),
    ("dpo {BASE} --loss DPO", "(did you mean dpo?)"),
    ("dpo {BASE} --optim.lrr 1e-3", "--optim.lrr: no such flag, type --optim.lr 1e-3 ("),
    ("dpo {BASE} --batch-size 8", "no such flag, type --train.batch-size 8 ("),
    (
        "dpo {BASE} --loss.gamma 1",
        "no such flag, the chosen --loss has --loss.beta, --loss.nll-coefficient (",
    ),
    ("dpo {BASE} --run.resume true", "takes no value, type --run.resume or --run.no-resume ("),
    ("dpo {BASE} --bf16 True", "no such flag, type --train.precision bf16 ("),
    ("generate --model m --prompts p --output o.jsonl", "type --model.path m; --prompts: no such "),
    ("dpo --model.path ./my-modle --data.train d.jsonl --run.dir r", "did you mean my-model?"),
    ("sft my-model d.jsonl", "no flag before it, type --model.path my-model --data.train d.jsonl;"),
    ("sft {BASE} -lr 1e-4", "no such flag, type --optim.lr 1e-4 ("),
    (
        "sft {BASE} --optim.lr 2e-5x",
        "sft: --optim.lr: could not convert string to float: '2e-5x' (",
    ),
    (
        "sft {BASE} --optim.schedule cosin",
        "--optim.schedule: expected one of constant, linear, cosine, got 'cosin' (did you mean "
        "cosine?) (",
    ),
    ("sft --config d.jsom", "no such file: d.jsom (did you mean d.jsonl?)"),
    ("data check pears.jsonl", "pears.jsonl: no such file or folder (did you mean pairs.jsonl?)"),
]


@pytest.mark.parametrize(("typed", "told"), MISTAKES)
def test_a_typical_mistake_is_one_line_with_what_to_type_instead(
    typed: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(typed.format(BASE=" ".join(BASE)).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert told in err


def test_known_noise_of_libraries_is_dropped_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet_libraries()
    for name, text in NOISE.items():
        logging.getLogger(name).warning(f"{text}: %s", "no module")
        logging.getLogger(name).warning("something else")
        logging.getLogger("another").warning(text)
    assert caplog.messages == ["something else", *NOISE.values()]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_shows_an_empty_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [command, "check"] if command == "data" else [command]
    with contextlib.suppress(SystemExit):
        assert main([*arguments, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not re.search(r"\(default: (None|''|)\)", words)
