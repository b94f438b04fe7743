"""Win rate, best of n and the frontier as a user would type them."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.main import main
from fastalign.models.load import save_model
from tests.judge_server import Reply, answers, chat, judge_server
from tests.small_runs import WORDS, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

JUDGE = ["--judge.model", "judge-7b", "--judge.backoff-seconds", "0"]
SIDES = ["--model.samples", "ours.jsonl", "--baseline.samples", "theirs.jsonl"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    (tmp_path / "bag.json").write_text(json.dumps({"bias": 0.0, "weights": {"good": 1.0}}))
    (tmp_path / "shorter.py").write_text(
        "def reward(prompts, completions):\n    return [-len(text) for text in completions]\n"
    )
    prompts = [f"The {word}" for word in WORDS[:4]]
    ours = [" good", " slow", " good", " dim"]
    theirs = [" dim", " good", " so good", " slow"]
    for name, texts in (("ours", ours), ("theirs", theirs)):
        rows = zip(prompts, texts, strict=True)
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": p, "completion": c} for p, c in rows])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    return tmp_path


def make_models(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_model(tiny_model("llama", vocab_size=320, seed=seed), make_tokenizer(), folder / name)


def likes_good(question: str, number: int) -> Reply:
    first, second = ("good" in answer for answer in answers(question))
    return chat("[[tie]]" if first == second else "[[A]]" if first else "[[B]]")


def test_win_rate_of_files_by_a_reward(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["win-rate", *SIDES, "--reward", "bag.json", "--out", "out/rate.json"]) == 0
    out = capsys.readouterr().out
    assert "win rate 0.500 (0.150 to 0.850; 95 %, wilson): 1 wins, 2 ties (one half each)" in out
    result = json.loads((work / "out/rate.json").read_text())
    assert (result["num_wins"], result["num_ties"], result["num_losses"]) == (1, 2, 1)
    assert result["config"]["reward"] == "bag.json"
    rows = rows_of(work / "out/rate.verdicts.jsonl")
    assert [row["verdict"] for row in rows] == ["win", "loss", "tie", "tie"]
    assert (rows[0]["model"], rows[0]["baseline"], rows[0]["model_reward"]) == (" good", " dim", 1)


def test_win_rate_of_two_models(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_models(work)
    sampling = ["--sampling.num-samples", "3", "--sampling.max-new-tokens", "6"]
    common = ["--data.prompts", "prompts.jsonl", *sampling, "--reward", "shorter:reward"]
    sides = ["--model.path", "one", "--baseline.path", "two"]
    assert main(["win-rate", *sides, *common, "--out", "rate.json"]) == 0
    result = json.loads((work / "rate.json").read_text())
    rows = rows_of(work / "rate.verdicts.jsonl")
    assert (len(rows), result["num_pairs"], result["num_prompts"]) == (12, 12, 4)
    assert "over prompts" in result["interval"]
    for row in rows:
        ours, theirs = len(row["model"]), len(row["baseline"])
        assert row["verdict"] == ("win" if ours < theirs else "loss" if ours > theirs else "tie")
    assert len({row["verdict"] for row in rows}) > 1
    # What `generate` draws with these settings is what was judged: a file may stand for a model.
    data = ["--data.prompts", "prompts.jsonl", *sampling, "--out", "two.jsonl"]
    assert main(["generate", "--model.path", "two", *data]) == 0
    sides = ["--model.path", "one", "--baseline.samples", "two.jsonl"]
    assert main(["win-rate", *sides, *common, "--out", "again.json"]) == 0
    assert rows_of(work / "again.verdicts.jsonl") == rows


def test_win_rate_by_a_judge(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with judge_server(likes_good) as served:
        judge = ["--judge.endpoint", served.url, *JUDGE, "--judge.key-variable", "JUDGE_KEY"]
        assert main(["win-rate", *SIDES, *judge, "--out", "rate.json"]) == 0
    out = capsys.readouterr().out
    assert "[answer A]\n{answer_a}" in out  # the question is shown
    assert "0.0% of 8 answers without a verdict" in out
    assert served.requests[0][1]["authorization"] == "Bearer sk-secret"
    result = json.loads((work / "rate.json").read_text())
    assert (result["num_wins"], result["num_ties"], result["num_losses"]) == (1, 2, 1)
    assert (result["num_answers"], result["share_order_dependent"]) == (8, 0.0)
    assert "{answer_b}" in result["template"]
    rows = rows_of(work / "rate.verdicts.jsonl")
    assert rows[0]["answers"] == ["[[A]]", "[[B]]"]
    for file in work.glob("rate*"):
        assert "sk-secret" not in file.read_text()
    assert "sk-secret" not in out


def test_a_template_of_the_users_own_is_asked(work: Path) -> None:
    (work / "question.txt").write_text("{prompt} / {answer_a} / {answer_b}?")
    with judge_server(lambda question, number: chat("B")) as served:
        judge = ["--judge.endpoint", served.url, *JUDGE, "--judge.template", "question.txt"]
        assert main(["win-rate", *SIDES, *judge, "--out", "rate.json"]) == 0
    asked = {body["messages"][0]["content"] for _, _, body in served.requests}
    assert f"The {WORDS[0]} /  dim /  good?" in asked
    assert json.loads((work / "rate.json").read_text())["num_ties"] == 4


def test_what_was_judged_before_a_failure_is_kept(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(question: str, number: int) -> Reply:
        return likes_good(question, number) if number <= 4 else (500, "down", {})

    common = ["win-rate", *SIDES, *JUDGE, "--judge.concurrency", "1", "--judge.retries", "1"]
    with judge_server(reply) as served:
        assert main([*common, "--judge.endpoint", served.url, "--out", "rate.json"]) == 2
    out, err = capsys.readouterr()
    assert "what was judged until here is in rate.verdicts.jsonl" in out
    assert err.endswith("after 2 requests: status 500: down\n")
    assert [row["verdict"] for row in rows_of(work / "rate.verdicts.jsonl")] == ["win", "loss"]
    assert not (work / "rate.json").exists()
    # Of a server that is down nothing is left, so that the next try finds its way free.
    assert main([*common, "--judge.endpoint", served.url, "--out", "next.json"]) == 2
    assert "ConnectError" in capsys.readouterr().err
    assert not (work / "next.verdicts.jsonl").exists()


def test_best_of_n_is_told_for_every_n(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_models(work)
    models = ["--model.path", "one", "--reference.path", "one"]
    data = ["--data.prompts", "prompts.jsonl", "--sampling.max-new-tokens", "6"]
    best = ["--best-of", "1", "2", "4", "--reward", "shorter:reward"]
    assert main(["eval", *models, *data, *best, "--out", "eval/eval.json"]) == 0
    result = json.loads((work / "eval/eval.json").read_text())
    samples = rows_of(work / "eval/samples.jsonl")
    assert len(samples) == 4 * 4
    assert [row["n"] for row in result["best_of_n"]] == [1, 2, 4]
    assert result["best_of_n"][0]["reward"] == pytest.approx(result["reward"])
    rewards = [[row["reward"] for row in samples[start : start + 4]] for start in range(0, 16, 4)]
    for row in result["best_of_n"]:
        by_prompt = [
            math.fsum(map(max, combinations(of_prompt, row["n"]))) / math.comb(4, row["n"])
            for of_prompt in rewards
        ]
        assert row["reward"] == pytest.approx(math.fsum(by_prompt) / 4)
        assert row["kl_bound"] == math.log(row["n"]) - (row["n"] - 1) / row["n"]
    assert result["best_of_n"][2]["reward"] > result["best_of_n"][0]["reward"]
    assert "KL to the model at most 0.636" in capsys.readouterr().out
    (work / "longer.py").write_text(
        "def reward(prompts, completions):\n    return [len(text) for text in completions]\n"
    )
    chosen = [*best, "--best-of-reward", "longer:reward", "--out", "chosen/eval.json"]
    assert main(["eval", *models, *data, *chosen]) == 0
    other = json.loads((work / "chosen/eval.json").read_text())
    # Chosen by the opposite of what is measured, the best of all four is the worst.
    worst = math.fsum(map(min, rewards)) / 4
    assert other["best_of_n"][2]["reward"] == pytest.approx(worst)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["win-rate", "--out", "x.json"],
            "model: expected model.path or model.samples, got neither",
        ),
        (
            ["win-rate", *SIDES, "--baseline.path", "m", "--out", "x"],
            "baseline: expected baseline.path or baseline.samples, got both",
        ),
        (["win-rate", *SIDES, "--out", "x.json"], "expected reward or judge.endpoint, got neither"),
        (
            ["win-rate", *SIDES, "--reward", "r", "--judge.endpoint", "http://h", "--out", "x"],
            "expected reward or judge.endpoint, got both",
        ),
        (
            ["win-rate", "--model.path", "m", *SIDES[2:], "--reward", "bag.json", "--out", "x"],
            "data.prompts: model.path needs prompts to sample from",
        ),
        (
            ["win-rate", *SIDES, "--data.prompts", "p", "--reward", "bag.json", "--out", "x"],
            "data.prompts: both sides are files of samples",
        ),
        (["win-rate", *SIDES, "--reward", "bag.json", "--out", "bag.json"], "bag.json exists"),
        (
            ["win-rate", *SIDES[:2], "--baseline.samples", "bag.json", "--reward", "bag.json"],
            "out",
        ),
        (
            ["win-rate", *SIDES, "--judge.endpoint", "http://h/v1", "--out", "x"],
            "judge.model: expected the judge's name",
        ),
        (
            ["win-rate", *SIDES, "--judge.endpoint", "here", *JUDGE, "--out", "x"],
            "expected an address such as http://localhost:8000/v1, got here",
        ),
        (
            ["win-rate", *SIDES, "--judge.concurrency", "0", "--reward", "bag.json", "--out", "x"],
            "judge.concurrency: expected at least 1, got 0",
        ),
        (
            [
                "eval",
                "--model.path",
                "m",
                "--reference.path",
                "r",
                "--out",
                "x",
                "--data.prompts",
                "prompts.jsonl",
                "--best-of",
                "2",
            ],
            "reward: the best of n needs a reward",
        ),
        (
            [
                "eval",
                "--model.path",
                "m",
                "--reference.path",
                "r",
                "--out",
                "x",
                "--best-of",
                "0",
                "--data.prompts",
                "prompts.jsonl",
                "--reward",
                "bag.json",
            ],
            "best_of: expected numbers of at least 1, got 0",
        ),
        (
            [
                "eval",
                "--model.path",
                "m",
                "--reference.path",
                "r",
                "--out",
                "x",
                "--data.prompts",
                "prompts.jsonl",
                "--reward",
                "b",
                "--best-of-reward",
                "b",
            ],
            "best_of_reward: expected best_of beside it",
        ),
    ],
)
def test_a_mistake_is_one_line(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1
    assert message in err
    assert not (work / "x").exists()
