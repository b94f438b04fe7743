"""`fastalign online-dpo` as a user would type it, and what it says of mistakes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import main
from fastalign.runs.config import config_to_dict
from fastalign.trainers import LOSSES
from tests.cli.test_commands import fastalign, new_model, rows_of, work

parse_online_dpo = ALGORITHMS["online-dpo"].parse

__all__ = ["work"]
BASE = ["--model.path", "base", "--data.train", "prompts.jsonl", "--reward.sources", "bag.json"]
FEW = ["--train.max-steps", "3", "--train.batch-size", "4", "--sampling.max-new-tokens", "5"]


def test_a_run_is_resumed_from_its_own_file(work: Path) -> None:
    new_model()
    (work / "first.yaml").write_text("reward:\n  sources: [bag.json, 'my_reward:shorter']\n")
    sources = ["--config", "first.yaml", *BASE[:4], "--reward.weights", "2", "0.5"]
    loss = ["--loss", "dpo_rao_kupper", "--loss.nu", "2", "--pairs.ties", "use"]
    fastalign("online-dpo", *sources, *FEW, *loss, "--run.dir", "run", "--train.stop-at-step", "2")
    saved = yaml.safe_load((work / "run/config.yaml").read_text())
    loss = {"name": "dpo_rao_kupper", "beta": 0.1, "nu": 2.0, "nll_coefficient": 0.0}
    assert saved["loss"] == loss
    assert saved["reward"]["sources"] == ["bag.json", "my_reward:shorter"]
    fastalign(
        "online-dpo", "--config", "run/config.yaml", "--run.resume", "--train.stop-at-step", "9"
    )
    rows = rows_of(work / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    parts = [rows[0][f"rewards/{name}/mean"] for name in ("bag", "my_reward:shorter")]
    assert rows[0]["objective/scores"] == pytest.approx(2 * parts[0] + 0.5 * parts[1], rel=1e-6)
    assert (work / "run/model/model.safetensors").exists()


def test_the_settings_that_are_saved_are_read_back(tmp_path: Path) -> None:
    config = parse_online_dpo([*BASE, "--run.dir", "r", "--reference.refresh-every", "5"])
    values = config_to_dict(config)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert config_to_dict(parse_online_dpo(["--config", str(tmp_path / "c.yaml")])) == values
    recipe = Path(__file__).parents[2] / "scripts/recipes/online-dpo.yaml"
    shipped = parse_online_dpo(["--config", str(recipe), *BASE, "--run.dir", "r"])
    assert (shipped.reward.missing_eos_penalty, shipped.loss.beta) == (1.0, 0.1)
    assert isinstance(shipped.loss, LOSSES["dpo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampling.num-samples", "1"], r"sampling\.num_samples: expected at least 2"),
        (
            ["--sampling.temperature", "1e300"],
            r"sampling\.temperature: expected 0, or a number from",
        ),
        (
            ["--sampling.temperature=-1"],
            r"sampling\.temperature: expected 0, or a number .* got -1",
        ),
        (["--pairs.ties", "use"], r"pairs\.ties: expected drop, for this loss has no place"),
        (["--pairs.ties", "keep"], "pairs.ties"),
        (["--pairs.epochs", "0"], r"pairs\.epochs: expected at least 1, got 0"),
        (["--reference.refresh-every", "2", "--reference.path", "b"], "no reference.path with it"),
        (["--reward.sources", "none.json"], "no such file: none.json"),
        (["--reward.sources", "my_reward:longer"], "'my_reward' has no function 'longer'"),
        (["--reward.sources"], "reward.sources: expected at least one"),
        (["--data.train", "pairs.json"], "pairs.json"),
        (["--data.train", "texts.jsonl"], r"texts\.jsonl:1: .*prompt"),
        (["--sampling.max-new-tokens", "5000"], r"sampling\.max_new_tokens: expected less than"),
        (["--loss", "nonsense"], "--loss: expected one of dpo, "),
        (["--reward.sources", "bad_reward:text"], "reward.sources: bad_reward:text: reward: exp"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new_model()
    (work / "bad_reward.py").write_text("def text(prompts, completions):\n    return completions\n")
    (work / "bag.json").write_text(json.dumps({"bias": 0.0, "weights": {"good": 1.0}}))
    capsys.readouterr()
    assert main(["online-dpo", *BASE, *FEW, "--run.dir", "run", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fastalign online-dpo: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert "Traceback" not in "".join(lines)
