"""Long work is seen: bars with rate and remaining time on a terminal, a few lines in a log."""

import gzip
import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastalign import progress
from fastalign.data import token_cache
from fastalign.progress import Phase, advance, duration, phase
from fastalign.runs.metrics import ProgressDisplay
from fastalign.trainers import (
    train_dpo,
    train_kto,
    train_online_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from tests.small_runs import (
    MakeConfig,
    dpo_config,
    ppo_config,
    reward_config,
    sft_config,
    write_rows,
)
from tests.trainers.kto.test_kto import kto_config
from tests.trainers.online_dpo.test_online_dpo import online_config


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(progress, "_clock", progress._Clock())
    return found


def test_a_log_gets_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with phase("evaluation", 100, "examples"):
        for _ in range(10):
            clock.now += 8
            advance(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "evaluation: 40 of 100 examples, 1.2 examples/s, 48 s left",
        "evaluation: 80 of 100 examples, 1.2 examples/s, 16 s left",
    ]
    with phase("tokenising", None, "rows"):  # short, though no line has come for a while
        clock.now += 29
        advance(5000)
        assert capsys.readouterr().out == ""
        clock.now += 2
        advance(5000)
    assert capsys.readouterr().out == "tokenising: 10,000 rows, 323 rows/s\n"


def test_hours_of_work_leave_a_page_of_lines(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(600):  # as many steps of a minute each
        with phase("generation", 60, "completions"):
            for _ in range(60):
                clock.now += 1
                advance()
    lines = capsys.readouterr().out.splitlines()
    assert 60 < len(lines) < 250
    assert all(
        re.fullmatch(r"generation: \d+ of 60 completions, 1 .*/s, \d+ s left", line)
        for line in lines
    )


def test_times_are_said_in_words() -> None:
    said = [duration(seconds) for seconds in (0.4, 119, 121, 3600, 7199, 11100)]
    assert said == ["0 s", "119 s", "2 min", "60 min", "2 h 00 min", "3 h 05 min"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def refreshed(terminal: Terminal) -> str:
    """What a refresh of the bars writes."""
    assert progress._shown is not None
    terminal.seek(0)
    terminal.truncate()
    progress._shown.refresh()
    return shown_on(terminal)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "25")
    return Terminal()


def test_a_phase_is_a_bar_beside_the_runs(
    clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    with redirect_stdout(terminal), ProgressDisplay("ppo", 4, 1) as display:
        with phase("generation", 64, "completions"):
            clock.now += 2
            advance(48)
            text = refreshed(terminal)
        assert re.search(r"ppo +\S+ 1/4", text)
        assert re.search(r"generation +\S+ 48/64 24 completions/s", text)
        display.update({"step": 2, "loss": 0.5, "tokens_per_second": 10.0})
        text = refreshed(terminal)
        assert "2/4 loss 0.5000  10 tokens/s" in text
        assert "generation" not in text
    assert progress._shown is None


def test_what_is_over_at_once_shows_no_bar(clock: Clock, terminal: Terminal) -> None:
    with redirect_stdout(terminal):
        with phase("evaluation", 4, "examples"):
            clock.now += 0.4
            advance(4)
            assert progress._shown is None
        assert terminal.getvalue() == ""
        with phase("evaluation", 4, "examples"):
            clock.now += 0.6
            advance(1)
            assert "evaluation" in refreshed(terminal)
        with ProgressDisplay("sft", 4, 0), phase("step 1", 4, "examples"):
            assert "step 1" not in refreshed(terminal)


def test_the_innermost_phase_of_a_thread_is_advanced() -> None:
    with phase("outer", 10, "rows") as outer:
        with phase("inner", 10, "rows") as inner:
            advance(3)
            other = threading.Thread(target=advance, args=(5,))
            other.start()
            other.join()
        advance(2)
        assert (outer.done, inner.done) == (2, 3)
        progress.restart()
        advance(20)
        assert outer.done == 10
    advance()  # of no phase


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[tuple[Any, float]]]]:
    """The total of each phase that was closed, and how much was done, by its name."""
    found: dict[str, list[tuple[Any, float]]] = {}
    plain = Phase.close

    def close(self: Phase) -> None:
        found.setdefault(re.sub(r"\d+", "N", self._name), []).append((self._total, self.done))
        plain(self)

    monkeypatch.setattr(Phase, "close", close)
    # What is done is not cut to the total, so that too much is seen.
    monkeypatch.setattr(
        Phase, "advance", lambda self, count: setattr(self, "done", self.done + count)
    )
    return found


OF_LOSS = {"step N", "evaluation"}
WORK: dict[str, tuple[MakeConfig, Callable[[Any], Any], set[str]]] = {
    "sft": (sft_config, train_sft, OF_LOSS),
    "dpo": (dpo_config, train_dpo, OF_LOSS | {"reference log-probs"}),
    "kto": (kto_config, train_kto, OF_LOSS | {"reference log-probs", "mismatched answers"}),
    "reward": (reward_config, train_reward, OF_LOSS | {"scores of pairs"}),
    "ppo": (ppo_config, train_ppo, {"held-out generation", "log-probs and values"}),
    "online-dpo": (online_config, train_online_dpo, {"log-probs of the samples"}),
}


@pytest.mark.parametrize("trainer", WORK)
def test_each_long_part_of_a_run_is_a_phase_that_comes_to_its_end(
    trainer: str, folder: Path, phases: dict[str, list[tuple[Any, float]]]
) -> None:
    make, train, expected = WORK[trainer]
    assert train(make(folder, "run", max_steps=2, tokens_per_batch=40)).finished
    if trainer in ("ppo", "online-dpo"):
        expected = expected | {"generation", "updates"}
    assert expected <= phases.keys()
    assert any(name.startswith("tokenising ") for name in phases)
    for name, closed in phases.items():
        for total, done in closed:
            assert total is not None
            assert done == pytest.approx(total), name


def test_a_file_of_any_format_is_tokenised_by_its_megabytes(
    folder: Path, phases: dict[str, list[tuple[Any, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)  # by several processes, into the cache
    texts = folder / "texts.jsonl"
    rows = [{"text": f"The {number} menu"} for number in range(600)]
    write_rows(texts, rows)
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(texts.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "texts.parquet")
    config = sft_config(folder, "run", max_steps=1)
    for name in ("texts.jsonl", "texts.jsonl.gz", "texts.parquet"):
        path = folder / name
        data = replace(config.data, train=str(path), eval=None)
        run = replace(config.run, dir=str(folder / f"run-{name}"))
        train_sft(replace(config, data=data, run=run))
        ((total, done),) = phases.pop(f"tokenising {re.sub(r'[0-9]+', 'N', str(path))}")
        assert done == pytest.approx(total) == pytest.approx(path.stat().st_size / 1e6)


def test_a_run_on_a_terminal_shows_its_steps_and_their_parts(
    folder: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    plain = Phase.advance

    def advance_and_refresh(self: Phase, count: float) -> None:
        plain(self, count)
        if self._bars is not None:
            self._bars.refresh()

    monkeypatch.setattr(Phase, "advance", advance_and_refresh)
    with redirect_stdout(terminal):
        train_dpo(dpo_config(folder, "run", max_steps=2, tokens_per_batch=40))
    text = shown_on(terminal)
    assert re.search(r"reference log-probs +\S+ \d+/\d+ +[\d.,]+ responses/s", text)
    assert re.search(r"step 2 +\S+ \d/4 +[\d.,]+ examples/s", text)
    assert re.search(r"evaluation +\S+ +\d+/12 +[\d.,]+ examples/s", text)
    assert re.search(r"dpo +\S+ +2/2 ", text)
    assert "step 2, held-out: loss " in text
