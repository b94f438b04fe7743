"""`fastalign ppo` as it is typed: settings, a run, and what is refused in one line."""

import json
from pathlib import Path

import pytest
import yaml

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import main
from fastalign.runs.config import config_to_dict
from fastalign.trainers import PPOConfig
from tests.small_runs import _one_thread, folder, prompts_file, words_reward

__all__ = ["_one_thread", "folder"]

BASE = [
    *("--model.path", "m", "--data.train", "p.jsonl", "--run.dir", "r"),
    *("--reward.sources", "a.json", "my:function"),
]


def parse(arguments: list[str]) -> PPOConfig:
    config: PPOConfig = ALGORITHMS["ppo"].parse(arguments)
    return config


def flags_of(folder: Path, run: str = "run") -> list[str]:
    return [
        *("ppo", "--model.path", str(folder / "llama"), "--data.train", prompts_file(folder)),
        *("--reward.sources", words_reward(folder), "--run.dir", str(folder / run)),
        *("--sampling.max-new-tokens", "4", "--train.batch-size", "4", "--train.max-steps", "2"),
        *("--train.device", "cpu"),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--reward.weights", "1", "-0.5", "--kl.target", "6", "--ppo.advantage.whiten", "both"],
        ["--ppo.advantage", "grpo", "--sampling.num-samples", "4", "--watch.stop"],
        ["--kl", "loss", "--kl.estimator", "full", "--ppo.advantage.gae-lambda", "1"],
        ["--value.path", "v", "--value.lr", "1e-5", "--ppo.ptx-data", "texts.jsonl"],
        ["--ppo.loss", "gspo", "--ppo.mean", "constant", "--ppo.mean.length", "9"],
        ["--ppo.importance", "masked", "--ppo.importance.max-weight", "3", "--ppo.loss", "cispo"],
        ["--ppo.loss.clip-range-high", "0.28", "--kl", "loss", "--kl.by-ratio"],
    ],
)
def test_the_saved_configuration_is_one_that_can_be_read(flags: list[str], tmp_path: Path) -> None:
    values = config_to_dict(parse([*BASE, *flags]))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert config_to_dict(parse(["--config", str(file)])) == values
    assert values["reward"]["sources"] == ["a.json", "my:function"]


def test_a_runs_own_file_with_an_engine_in_it_starts_another(tmp_path: Path) -> None:
    engine = ["--vllm.tensor-parallel", "2", "--vllm.no-sleep", "--vllm.sync-folder", "w"]
    saved = config_to_dict(parse([*BASE, "--sampler", "vllm-server", *engine]))
    assert saved["sampler"] == "vllm-server"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(saved))
    again = parse(["--config", str(file), "--run.dir", "other"])
    assert config_to_dict(again) == {**saved, "run": {**saved["run"], "dir": "other"}}
    assert (again.vllm.tensor_parallel, again.vllm.sleep, again.vllm.sync_folder) == (2, False, "w")
    file.write_text(yaml.safe_dump({**saved, "sampler": "vllm-process"}))  # of an earlier version
    assert parse(["--config", str(file), "--sampler", "vllm-server"]).sampler == "vllm-server"
    with pytest.raises(ValueError, match="sampler: vllm-process is gone; use vllm-server"):
        parse(["--config", str(file)])
    with pytest.raises(ValueError, match=r"vllm\.tensor_parallel: .* one GPU; expected --sampler"):
        parse(["--config", str(file), "--sampler", "vllm"])


ONE, TWO = "http://one:8000", "http://two:8000"


@pytest.mark.parametrize(
    ("text", "flags", "urls"),
    [
        ("{}", ["--vllm.url", ONE, "--sampler", "vllm-server"], (ONE,)),
        ("{}", ["--vllm.url", ONE, TWO, "--sampler", "vllm-server"], (ONE, TWO)),
        (f"{{sampler: vllm-server, vllm: {{url: '{ONE}'}}}}", [], (ONE,)),
        (f"{{sampler: vllm-server, vllm: {{url: ['{ONE}', '{TWO}']}}}}", [], (ONE, TWO)),
        (
            f"{{sampler: vllm-server, vllm: {{url: ['{ONE}', '{TWO}']}}}}",
            ["--vllm.url", TWO],
            (TWO,),
        ),
        ("{sampler: vllm-server, vllm: {url: null}}", [], None),
        ("{sampler: vllm-server, vllm: {url: []}}", [], None),
    ],
)
def test_one_server_or_several_are_named_on_the_command_line_and_in_a_file(
    text: str, flags: list[str], urls: tuple[str, ...] | None, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    config = parse(["--config", str(file), *BASE, *flags])
    assert config.vllm.url == urls
    file.write_text(yaml.safe_dump(config_to_dict(config)))  # a run's own
    assert parse(["--config", str(file)]).vllm.url == urls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampler: {name: vllm}\n", "sampler: expected a value, got a mapping"),
        ("sampler: vlm\n", "sampler"),
        ("samplr: vllm\n", "unknown section 'samplr'; expected one of model, data"),
        ("vllm: eager\n", "vllm: expected keys and values, got 'eager'"),
        ("sampling: 3\n", "sampling: expected keys and values, got 3"),
        ("vllm:\n  egaer: true\n", "unknown key vllm.egaer; expected one of url"),
    ],
)
def test_a_value_for_a_section_or_the_reverse_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"sampl|vllm") as caught:
        parse(["--config", str(file), *BASE])
    assert message in str(caught.value)


def test_the_defaults_are_the_published_ones() -> None:
    config = parse(BASE)
    assert (config.ppo.epochs, config.ppo.mini_batches, config.ppo.loss.clip_range) == (4, 1, 0.2)
    advantage = config.ppo.advantage
    assert (advantage.gamma, advantage.gae_lambda, config.value.coefficient) == (1.0, 0.95, 0.1)
    assert (config.kl.coefficient, config.kl.estimator, config.optim.eps) == (0.05, "k1", 1e-5)
    assert (advantage.name, advantage.whiten, config.kl.name) == ("gae", "advantages", "reward")


def test_grpo_and_rloo_have_their_own_defaults(tmp_path: Path) -> None:
    expected = {
        "grpo": ("grpo", "loss", 0.0, 8, 512, 1, 1e-6),
        "rloo": ("rloo", "reward", 0.05, 4, 512, 1, 1e-6),
    }
    for command, numbers in expected.items():
        config = ALGORITHMS[command].parse(BASE)
        kl, sampling, settings = config.kl, config.sampling, config.ppo
        found = (settings.advantage.name, kl.name, kl.coefficient, sampling.num_samples)
        found += (sampling.max_new_tokens, settings.epochs, config.optim.lr)
        assert found == numbers
        assert (settings.loss.name, settings.mean.name, settings.importance.name) == (
            "clip",
            "tokens",
            "none",
        )
        values = config_to_dict(config)
        assert "value" not in values
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        assert config_to_dict(ALGORITHMS[command].parse(["--config", str(file)])) == values
    other = ALGORITHMS["grpo"].parse([*BASE, "--kl", "reward", "--ppo.advantage", "dr_grpo"])
    assert (other.kl.coefficient, other.ppo.advantage.name, other.ppo.epochs) == (
        0.05,
        "dr_grpo",
        1,
    )
    changed = ALGORITHMS["grpo"].parse([*BASE, "--kl.coefficient", "0.01", "--ppo.epochs", "2"])
    assert (changed.kl.name, changed.kl.coefficient, changed.ppo.epochs) == ("loss", 0.01, 2)
    with pytest.raises(ValueError, match=r"--ppo.advantage: expected one of grpo, dr_grpo, got"):
        ALGORITHMS["grpo"].parse([*BASE, "--ppo.advantage", "gae"])
    with pytest.raises(ValueError, match=r"--value.lr: no such flag"):
        ALGORITHMS["grpo"].parse([*BASE, "--value.lr", "1e-5"])


@pytest.mark.parametrize("command", ["grpo", "rloo"])
def test_a_run_without_a_value_model(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *flags_of(folder)[1:], "--sampling.num-samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "value model: " not in out
    assert (folder / "run/model/model.safetensors").exists()
    rows = [json.loads(row) for row in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["num_updates"] for row in rows] == [1, 1]
    assert f"fastalign {command}" in (folder / "run/model/README.md").read_text()


def test_a_run_and_one_that_collapses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags_of(folder)) == 0
    assert (folder / "run/model/model.safetensors").exists()
    assert "value model: " in capsys.readouterr().out
    collapsing = ["--watch.stop", "--watch.patience", "1", "--watch.min-length", "10"]
    assert main([*flags_of(folder, "collapsed"), *collapsing]) == 3
    out = capsys.readouterr().out
    assert "stopped at step 1 (collapsed for 1 steps: mean length" in out
    assert "go on with --run.resume" in out
    assert json.loads((folder / "collapsed/metrics.jsonl").read_text())["collapsed"] == 1
    assert main([*flags_of(folder, "collapsed"), "--run.resume"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward.sources", "no.json"], "reward: no such file: no.json"),
        (["--reward.sources", "no_module:f"], "cannot import 'no_module'"),
        (["--reward.sources", "json:nothing"], "'json' has no function 'nothing'"),
        (["--reward.weights", "1", "2"], "reward.weights: expected 1"),
        (["--data.train", "no.jsonl"], "no.jsonl"),
        (["--ppo.loss.clip-range", "2"], "ppo.loss.clip_range: expected a number in (0, 1), got 2"),
        (
            ["--ppo.advantage", "a2c"],
            "--ppo.advantage: expected one of gae, rloo, grpo, dr_grpo, got 'a2c'",
        ),
        (["--ppo.clip-range", "0.1"], "no such flag, type --ppo.loss.clip-range 0.1"),
        (["--ppo.loss", "sapo"], "--ppo.loss: expected one of clip, gspo, cispo, got 'sapo'"),
        (["--ppo.loss", "cispo", "--ppo.loss.clip-range", "0.1"], "--ppo.loss.clip-range"),
        (["--ppo.max-importance-weight", "2"], "type --ppo.importance truncated"),
        (["--ppo.advantage", "rloo", "--ppo.advantage.gamma", "0.9"], "--ppo.advantage.gamma"),
        (["--kl", "loss", "--kl.estimator", "k1"], "kl.estimator"),
        (["--kl", "both"], "--kl: expected one of reward, loss, got 'both'"),
        (["--loss.beta", "0.1"], "--loss.beta"),
        (["--sampling.top-p", "0.9"], "sampling: expected samples of the policy itself"),
        (["--sampling.max-new-tokens", "64"], "expected less than the model's 64 positions"),
        (["--value.path", "nowhere/at/all"], "value.path: no model can be loaded"),
        (["--reference.path", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags_of(folder), *flags]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastalign ppo: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_bad_prompts_are_named_by_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of(folder)
    file = folder / "prompts.jsonl"
    rows = file.read_text().splitlines()
    rows[3] = '{"prompt": ""}'
    file.write_text("\n".join(rows) + "\n")
    assert main(flags) == 2
    assert "prompts.jsonl:4: column 'prompt': expected text" in capsys.readouterr().err
    assert main([*flags, "--data.on-bad-row", "skip"]) == 0
    assert "skipped: " in capsys.readouterr().out
