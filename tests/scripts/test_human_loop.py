"""The script of the whole loop: its mistakes, and the annotator that stands for people."""

import importlib
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fastalign.cli.compare.serve import bound_socket
from tests.compare.site import Site, new_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def simulated_annotators(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("simulated_annotators")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--simulate"], "--simulate: expected a value, got none"),
        (["--unknown"], "unknown option --unknown"),
        (["--model", "missing"], "no model in missing"),
        (["docs"], "docs exists; remove it"),
    ],
)
def test_mistakes_come_before_any_work(arguments: list[str], expected: str) -> None:
    script = [str(ROOT / "scripts/human_loop.sh"), *arguments]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"human_loop: {expected}" in done.stderr


def test_simulated_annotators_vote_by_the_reward(
    simulated_annotators: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = new_store(tmp_path, 40)
    site = Site(store, ("anna", "ben"))
    rewards = tmp_path / "reward.json"
    rewards.write_text(json.dumps({"bias": 0.0, "weights": {"second": 4.0}}))
    with bound_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(site.application(port), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        links = [f"http://127.0.0.1:{port}/?key={site.keys[name]}" for name in ("anna", "ben")]
        more = ["--reward", str(rewards), "--votes", "15"]
        monkeypatch.setattr("sys.argv", ["simulated_annotators.py", *links, *more])
        try:
            assert simulated_annotators.main() == 0
        finally:
            server.should_exit = True
            thread.join()
    votes: list[Any] = store.votes()
    assert [sum(v.annotator == person for v in votes) for person in (1, 2)] == [15, 15]
    assert "30 votes of 2 annotators" in capsys.readouterr().out
    verdicts = [vote.verdict for vote in votes]
    assert verdicts.count("b") > 24  # the answer with the word, at odds of e^4 : 1.5
    assert len({vote.pair for vote in votes}) == 30


def test_a_shown_conversation_is_read_back(simulated_annotators: Any, tmp_path: Path) -> None:
    site = Site(new_store(tmp_path, 1))
    plain = simulated_annotators.ShownPair(site.browser().page)
    assert plain.prompt() == "Question 0?"
    assert sorted(plain.answers()) == ["first 0", "the second one 0"]
    turns = [{"role": "user", "content": "a <b> & c\n  d"}, {"role": "assistant", "content": "e"}]
    section = site.pages.render(
        "compare",
        prompt=site.pages.turns(turns),
        sides=[{"name": n, "turns": site.pages.answer([turns[1]])} for n in "AB"],
        signed="x",
        **{"said": "", "owner": False, "last": None, "progress": {"mine": "0", "all": "0"}},
        model=[],
    )
    found = simulated_annotators.ShownPair(section)
    assert found.prompt() == turns
    assert found.answers() == ["e", "e"]
    assert found.form == {"shown": "x"}
