"""The GSM8K recipe: the same settings as a file and in Python, trained on problems of its kind."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import main
from fastalign.rewards import numeric_answer
from fastalign.runs.config import config_to_dict
from fastalign.samples import folder as sample_folder
from fastalign.trainers import PPOConfig, train_ppo
from tests.small_runs import read_metrics, write_rows

RECIPES = Path(__file__).parents[3] / "scripts/recipes"


def recipe(model: str, run: str) -> PPOConfig:
    """What the script's function returns."""
    spec = importlib.util.spec_from_file_location("gsm8k_recipe", RECIPES / "gsm8k.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: PPOConfig = module.gsm8k(model, run)
    return found


def test_the_file_and_the_script_are_the_same_settings() -> None:
    command = ["--config", str(RECIPES / "gsm8k.yaml"), "--model.path", "m", "--run.dir", "r"]
    parsed = ALGORITHMS["ppo"].parse(command)
    assert config_to_dict(parsed) == config_to_dict(recipe("m", "r"))


def test_the_shipped_solutions_end_in_the_shipped_answers() -> None:
    for name, number in (("train", 400), ("eval", 100)):
        lines = (sample_folder("gsm8k") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        solutions, answers = ([row[name] for row in rows] for name in ("completion", "answer"))
        assert numeric_answer(solutions, answers) == [1.0] * number
        assert numeric_answer(solutions, ["0.5"] * number) == [0.0] * number


def test_grpo_trains_on_answers_from_a_command_and_from_python(folder: Path) -> None:
    rows = [
        {"prompt": f"{n} - 1 =", "completion": f"#### {n - 1}", "answer": f"{n - 1}"}
        for n in range(1, 10)
    ]
    data = str(write_rows(folder / "problems.jsonl", rows))
    model, run = str(folder / "llama"), folder / "command"
    sizes: dict[str, Any] = {"max_steps": 2, "eval_every": 2, "batch_size": 6, "device": "cpu"}
    flags = [
        part
        for key, value in sizes.items()
        for part in (f"--train.{key.replace('_', '-')}", str(value))
    ]
    flags += ["--data.train", data, "--data.eval", data, "--sampling.max-new-tokens", "16"]
    own = ["--model.path", model, "--run.dir", str(run), "--optim.lr", "1e-2"]
    assert main(["ppo", "--config", str(RECIPES / "gsm8k.yaml"), *own, *flags]) == 0

    config = recipe(model, str(folder / "python"))
    config = replace(
        config,
        data=replace(config.data, train=data, eval=data),
        sampling=replace(config.sampling, max_new_tokens=16),
        optim=replace(config.optim, lr=1e-2),
        train=replace(config.train, **sizes),
    )
    assert train_ppo(config).finished
    first, second = read_metrics(run), read_metrics(folder / "python")
    for name in ("reward", "grad_norm", "loss", "objective/kl"):
        assert [row[name] for row in first] == [row[name] for row in second]
    assert 0 < first[0]["reward"] < 1
    assert first[0]["grad_norm"] > 0
    assert first[1]["objective/kl"] > 0  # the first step moved the policy
