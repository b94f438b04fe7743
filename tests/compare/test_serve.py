"""`fastalign compare` as it is typed: links, server, a kill between two votes, two models."""

import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fastalign.cli.compare import serve
from fastalign.cli.compare.settings import CompareConfig, CompareServer
from fastalign.cli.main import main
from fastalign.compare.results import results
from fastalign.compare.store import Store
from fastalign.models.load import save_model
from tests.compare.site import Inputs, new_pairs
from tests.small_runs import WORDS, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

PAIRS = [
    {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b}
    for pair in new_pairs(5)
]


def vote(client: httpx2.Client, origin: str, verdict: str) -> None:
    shown = Inputs(client.get("/").text).values["shown"]
    data = {"shown": shown, "verdict": verdict}
    reply = client.post("/vote", data=data, headers={"origin": origin}, follow_redirects=True)
    assert "Saved." in reply.text, reply.text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_the_command_serves_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("pairs.jsonl"), PAIRS)
    store = Store("c.db", create=True)
    keys = [str(store.annotator(name).key) for name in ("anna", "ben")]
    port, wrong, listens = free_port(), list[BaseException](), threading.Event()
    printed = serve.print_links

    def print_links(*arguments: Any) -> None:
        printed(*arguments)
        listens.set()

    monkeypatch.setattr(serve, "print_links", print_links)
    origin = f"http://127.0.0.1:{port}"

    def people() -> None:
        try:
            assert listens.wait(60)
            for key in keys:
                with httpx2.Client(base_url=origin) as client:
                    client.get("/", params={"key": key})
                    vote(client, origin, "left")
                    vote(client, origin, "tie")
            assert main(["compare", "--out", "c.db", "--server.port", "0"]) == 2
        except BaseException as error:
            wrong.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=people)
    thread.start()
    arguments = ["--annotators", "anna,ben", "--server.port", str(port)]
    assert main(["compare", "pairs.jsonl", "--out", "c.db", *arguments]) == 0
    thread.join()
    assert wrong == []
    out, err = capsys.readouterr()
    assert f"anna: {origin}/?key={keys[0]}\n" in out  # an annotator keeps the link
    assert "4 votes in c.db; fastalign compare export c.db --out pairs.jsonl writes them" in out
    assert "another process serves it" in err
    assert [v.annotator for v in store.votes()] == [1, 1, 2, 2]
    assert keys[0] not in err


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[str]]]:
    """What would be served, without a server."""
    found: list[tuple[Any, list[str]]] = []

    def note(config: CompareConfig, parts: Any, listening: socket.socket, hosts: list[str]) -> None:
        serve.print_links(config, listening.getsockname()[1], parts.keys)
        found.append((parts, hosts))

    monkeypatch.setattr(serve, "serve", note)
    return found


def test_two_models_are_compared_blind(
    tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        save_model(tiny_model("llama", vocab_size=320, seed=seed), make_tokenizer(), Path(name))
    write_rows(Path("prompts.jsonl"), [{"prompt": f"The {word}"} for word in WORDS[:4]])
    sampling = ["--sampling.max-new-tokens", "6", "--data.prompts", "prompts.jsonl"]
    arguments = ["compare", "--a", "one", "--b", "two", *sampling, "--server.port", "0"]
    assert main(arguments) == 0
    store = Store("comparisons.db")
    pairs = store.pairs()
    assert {(p.prompt, p.model_a, p.model_b) for p in pairs} == {
        (f"The {word}", "one", "two") for word in WORDS[:4]
    }
    for name, side in (("one", "response_a"), ("two", "response_b")):
        generate = ["generate", "--model.path", name, *sampling, "--out", f"{name}.jsonl"]
        assert main(generate) == 0
        rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        assert [row["completion"] for row in rows] == [getattr(p, side) for p in pairs]
    # Their files stand for the models, as other models.
    files = ["--a", "one.jsonl", "--b", "two.jsonl", "--out", "files.db", "--server.port", "0"]
    assert main(["compare", *files]) == 0
    store = Store("files.db")
    assert [p.response_a for p in store.pairs()] == [p.response_a for p in pairs]
    assert results(store)["num_pairs"] == 4


def test_a_reward_model_chooses_from_the_start(
    tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_model("llama", vocab_size=320), make_tokenizer(), tmp_path / "llama")
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    base = ["compare", str(path), "--out", str(tmp_path / "c.db"), "--server.port", "0"]
    reward = ["--reward", str(tmp_path / "llama"), "--choice.random-share", "0"]
    assert main([*base, *reward]) == 0
    assert "reading 5 pairs with" in capsys.readouterr().out
    parts, _ = served[0]
    assert len(parts.watchers) == 1
    shown = parts.labelling.shown(1)
    assert shown.chosen_by == "model"
    assert main([*base, "--reward", str(tmp_path)]) == 2
    assert "fastalign compare: reward: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--annotators", "anna,,ben"], "annotators: expected names with commas between"),
        (["--annotators", "anna,anna"], "annotators: expected each name once"),
        (["--annotators", "(results)"], "annotators: expected names"),
        (["--a", "runs/x/model"], "expected --a and --b together"),
        (["--a", "runs/x", "--b", "runs/y"], "data.prompts: the model --a needs prompts, got none"),
        (["--choice.votes-per-pair", "0"], "choice.votes_per_pair: expected at least 1, got 0"),
        (["--choice.repeat-share", "1.5"], "choice.repeat_share: expected a share from 0 to 1"),
        (["--server.host", "0.0.0.0"], "--server.names gives the names or addresses"),
        (["--out", "missing.db"], "missing.db: no such file"),
        (["missing.jsonl"], "no such file"),
        (["--sampler", "vllm-process"], "vllm-process"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    tmp_path: Path,
    served: list[Any],
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--server.port", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert served == []


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        out = str(tmp_path / "c.db")
        assert main(["compare", "--out", out, "--server.port", port]) == 2
    assert f"server.port: 127.0.0.1 port {port}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("server", "hosts"),
    [
        (CompareServer(), {"localhost", "127.0.0.1", "[::1]"}),
        (CompareServer("10.0.0.5"), {"localhost", "127.0.0.1", "[::1]", "10.0.0.5"}),
        (CompareServer("::", names=("lab.example", "fe80::1")), {"lab.example", "[fe80::1]"}),
    ],
)
def test_the_names_that_are_answered(server: CompareServer, hosts: set[str]) -> None:
    assert hosts <= set(serve.host_names(CompareConfig(server=server)))
    assert "0.0.0.0" not in serve.host_names(CompareConfig(server=server))


def test_links_are_printed_though_they_are_secrets(
    tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ["--out", str(tmp_path / "c.db"), "--server.port", "0", "--annotators", "anna,ben"]
    assert main(["compare", str(path), *arguments]) == 0
    out = capsys.readouterr().out
    store = Store(tmp_path / "c.db")
    for person in store.annotators():
        assert f"/?key={person.key}\n" in out
    assert re.search(r"^anna: http://127\.0\.0\.1:\d+/\?key=", out, re.MULTILINE)
    assert re.search(r"^results: http", out, re.MULTILINE)
    assert os.stat(tmp_path / "c.db").st_mode & 0o777 == 0o600
