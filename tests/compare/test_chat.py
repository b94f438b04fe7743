"""`fastalign chat`: answers as they are drawn, and verdicts that become comparisons."""

import json
from pathlib import Path

import pytest

from fastalign.cli.compare import chat
from fastalign.cli.main import main
from fastalign.compare.results import results
from fastalign.compare.store import Store
from fastalign.models.load import save_model
from tests.small_runs import write_rows
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, make_tokenizer


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        tokenizer = make_tokenizer(chat_template=CHATML)
        save_model(tiny_model("llama", vocab_size=320, seed=seed), tokenizer, tmp_path / name)
    return tmp_path


def talk(monkeypatch: pytest.MonkeyPatch, typed: list[str], *arguments: str) -> int:
    """Run the command while these lines are typed, and then the input ends."""
    left = list(typed)

    def typing(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", typing)
    short = ["--sampling.max-new-tokens", "5"]
    return main(["chat", "--model.path", "one", "--out", "c.db", *short, *arguments])


def test_an_answer_is_what_generate_draws_and_comes_in_pieces(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(chat, "write", pieces.append)
    assert talk(monkeypatch, ["Hi", "/quit"], "--run.seed", "6", "--system", "Be kind.") == 0
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    write_rows(work / "p.jsonl", [{"prompt": turns}])
    same = ["--data.prompts", "p.jsonl", "--sampling.max-new-tokens", "5", "--run.seed", "7"]
    assert main(["generate", "--model.path", "one", *same, "--out", "s.jsonl"]) == 0
    (row,) = map(json.loads, (work / "s.jsonl").read_text().splitlines())
    assert "".join(pieces[1:]) == row["completion"] + "\n"
    assert len(pieces) > 4


def test_a_second_answer_is_compared_and_the_conversation_goes_on_with_the_better_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["Hi", "/a", "/again", "/b", "/b", "And now?", "/again", "/same", "/undo", "/bad"]
    assert talk(monkeypatch, typed) == 0
    out = capsys.readouterr().out
    assert out.count("there are no two answers to compare") == 2
    store = Store("c.db")
    pairs = store.pairs()
    first, second = store.votes()
    assert (first.verdict, first.chosen_by, second.verdict) == ("b", "chat", "both_bad")
    assert pairs[0].prompt == [{"role": "user", "content": "Hi"}]
    assert pairs[1].prompt == [
        *pairs[0].prompt,
        *pairs[0].response_b,
        {"role": "user", "content": "And now?"},
    ]
    assert main(["compare", "export", "c.db", "--out", "pairs.jsonl"]) == 0
    labels = [json.loads(line)["label"] for line in Path("pairs.jsonl").read_text().splitlines()]
    assert labels == ["b", "tie"]


def test_two_models_answer_blind(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [word for n in range(8) for word in (f"Number {n}?", "/a", "/new")]
    assert talk(monkeypatch, [*typed, "The", "/which"], "--beside", "two") == 0
    out = capsys.readouterr().out
    assert "[A] " in out
    assert "[B] " in out
    assert "A: one\nB: two\n" in out or "A: two\nB: one\n" in out
    store = Store("c.db")
    assert {(pair.model_a, pair.model_b) for pair in store.pairs()} == {("one", "two")}
    assert {vote.shown_left for vote in store.votes()} == {"a", "b"}  # a coin decides
    assert all(vote.verdict == vote.shown_left for vote in store.votes())
    wins = sum(vote.verdict == "a" for vote in store.votes())
    assert results(store)["num_wins"] == wins


def test_mistakes_are_answered_and_the_talk_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["/undo", "/again", "/what", "The battery " * 40, "/new", "Hi"]
    assert talk(monkeypatch, typed) == 0
    out = capsys.readouterr().out
    for text in (
        "there is nothing to undo",
        "/again asks one model",
        "/new       begin",
        "/new begins anew",
    ):
        assert text in out
    assert talk(monkeypatch, [], "--beside", "one") == 2
