"""YAML under flags, and one line for whatever is wrong with either."""

import contextlib
import pickle
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import field_docs, parse_config
from fastalign.cli.main import COMMANDS, main
from fastalign.runs.config import LoraConfig, ModelConfig, RunConfig, config_to_dict
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


def test_the_saved_configuration_is_one_that_can_be_read(tmp_path: Path) -> None:
    import yaml

    config = parse_dpo([*BASE, "--loss", "dpo_rao_kupper", "--loss.nu", "2.5"])
    values = config_to_dict(config)
    assert values["loss"] == {"name": "dpo_rao_kupper", "beta": 0.1, "nu": 2.5}
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
    with pytest.raises(ValueError, match=r"model\.lora\.rank: expected 0, a reward model"):
        parse_reward([*BASE, "--model.lora.rank", "8"])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_chosen(name: str) -> None:
    loss = parse_dpo([*BASE, "--loss", name]).loss
    assert isinstance(loss, LOSSES[name])
    assert loss.formula().name == name
    assert loss.formula().parameters == asdict(loss)
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required, but not given: --model.path, --data.train, --run.dir \(see fastalign dpo"),
        (
            ["--modl.path", "m", *BASE[2:]],
            r"--model.path; unrecognized: --modl.path m \(",
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
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        parse_dpo(["--config", file, *BASE])
    assert message in str(caught.value)


def test_sft_takes_the_same_settings_without_a_loss(tmp_path: Path) -> None:
    assert parse_config(SFTConfig, BASE, "fastalign sft").optim.lr == 2e-5
    with pytest.raises(ValueError, match="--loss"):
        parse_config(SFTConfig, [*BASE, "--loss", "dpo"], "fastalign sft")
    with pytest.raises(ValueError, match="unknown section 'loss'"):
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
        parse_config(PPOConfig, ["--help"], "fastalign ppo")
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
