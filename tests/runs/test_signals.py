"""Requests to stop: the first is said, what follows at once is the same, a later one counts."""

import os
import signal

import pytest

from fastalign.runs import observe as signals
from fastalign.runs.observe import stop_on_signal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", signals.EXIT_CODES)
def test_a_second_request_within_two_seconds_is_the_same(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    reached: list[int] = []
    before = signal.signal(number, lambda *_: reached.append(1))
    try:
        with stop_on_signal() as request:
            send(number)
            now += 1.9
            send(number)
            send(signal.SIGTERM)
            assert (request.received, reached) == (number, [])
            now += 0.2
            send(number)
            assert request.insisted is (number != signal.SIGXCPU)
            assert reached == ([] if number == signal.SIGXCPU else [1])
    finally:
        signal.signal(number, before)


def test_a_request_is_said_at_once_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(signals.sys, "stderr", terminal)
        for speaks in (True, False):
            with stop_on_signal(speaks=speaks):
                send(signal.SIGINT)
    with os.fdopen(reader, "rb") as said:
        assert said.read() == b"\nstopping after this step and saving; again: stop now\n"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signal() as request:
            send(signal.SIGHUP)
            assert request.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
