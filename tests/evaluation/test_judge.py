"""A language model as judge, behind an endpoint on this machine that behaves in every way."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastalign.data.conversation import Message
from fastalign.evaluation.judge import chat_endpoint
from fastalign.evaluation.judge.chat_endpoint import ChatEndpoint, EndpointConfig
from fastalign.evaluation.judge.judge import (
    both_orders,
    fill,
    judge_by_endpoint,
    judge_statistics,
    read_template,
    read_verdict,
)
from fastalign.evaluation.win_rate import AnswerPair, Judged, win_rate
from tests.judge_server import Reply, Served, answers, chat, judge_server

PAIRS = [
    AnswerPair("The phone", " is good", " is slow", 0),
    AnswerPair("The menu", " is dim", " is good", 0),
    AnswerPair("The screen", " is good", " is so good", 0),
    AnswerPair((Message("user", "And the camera?"),), " dim", " slow", 0),
]


def likes_good(question: str, number: int) -> Reply:
    first, second = ("good" in answer for answer in answers(question))
    verdict = "tie" if first == second else "A" if first else "B"
    return chat(f"They differ, [[A]] or [[B]]?\n\n[[{verdict}]]")


def settings(url: str, **values: object) -> EndpointConfig:
    return EndpointConfig(endpoint=url, model="judge-7b", backoff_seconds=0.0, **values)  # type: ignore[arg-type]


def judge(url: str, pairs: list[AnswerPair] = PAIRS, **values: object) -> list[Judged]:
    config = settings(url, **values)
    template = read_template(None)
    return list(judge_by_endpoint(ChatEndpoint(config), template, pairs, config.concurrency))


def test_every_pair_is_asked_about_in_both_orders() -> None:
    with judge_server(likes_good) as served:
        judged = judge(f"{served.url}/", temperature=None, max_tokens=9)
    assert [found.verdict for found in judged] == ["win", "loss", "tie", "tie"]
    asked = [(path, answers(body["messages"][0]["content"])) for path, _, body in served.requests]
    both = [(pair.model, pair.baseline) for pair in PAIRS]
    assert sorted(asked) == sorted(
        ("/v1/chat/completions", order) for pair in both for order in (pair, pair[::-1])
    )
    body = served.requests[0][2]
    assert (body["model"], body["max_tokens"]) == ("judge-7b", 9)
    assert "temperature" not in body
    assert any("[user] And the camera?" in str(body) for _, _, body in served.requests)
    assert judged[0].details["read"] == ["A", "B"]
    assert judged[0].details["answers"][1].endswith("[[B]]")
    result = win_rate(PAIRS, judged)
    assert (result["win_rate"], result["num_ties"], result["num_undecided"]) == (0.5, 2, 0)


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_with_a_favourite_place_finds_ties_only(place: str) -> None:
    with judge_server(lambda question, number: chat(f"[[{place}]]")) as served:
        judged = judge(served.url)
    assert [found.verdict for found in judged] == ["tie"] * 4
    result = judge_statistics(judged)
    assert result["share_order_dependent"] == 1.0
    assert result["share_first"] == (1.0 if place == "A" else 0.0)


def test_identical_answers_are_a_tie_that_nobody_is_asked_about() -> None:
    pairs = [AnswerPair("The phone", " is good", " is good", 0), PAIRS[0]]
    with judge_server(likes_good) as served:
        judged = judge(served.url, pairs)
    assert [found.verdict for found in judged] == ["tie", "win"]
    assert len(served.requests) == 2
    result = judge_statistics(judged)
    assert (result["num_identical"], result["num_answers"], result["share_first"]) == (1, 2, 0.5)


@pytest.mark.parametrize(
    "bad",
    [
        chat("Both are fine."),
        chat(None),
        chat(""),
        (200, "<html>", {}),
        (200, '{"choices": []}', {}),
    ],
    ids=["no verdict", "null", "empty", "no JSON", "no choice"],
)
def test_an_answer_without_a_verdict_is_counted_and_kept(bad: Reply) -> None:
    def reply(question: str, number: int) -> Reply:
        return bad if answers(question)[0] == " is slow" else likes_good(question, number)

    with judge_server(reply) as served:
        judged = judge(served.url)
    assert [found.verdict for found in judged] == [None, "loss", "tie", "tie"]
    assert judged[0].details["read"] == ["A", None]
    result = judge_statistics(judged)
    assert (result["num_unparsable"], result["share_unparsable"]) == (1, 1 / 8)
    rate = win_rate(PAIRS, judged)
    assert (rate["num_undecided"], rate["num_pairs"]) == (1, 4)
    assert rate["win_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "failures",
    [
        [(429, "", {"Retry-After": "0"}), (500, "", {}), (503, "", {"Retry-After": "soon"})],
        [None, (529, "overloaded", {})],
    ],
    ids=["busy", "cut off"],
)
def test_a_busy_endpoint_is_asked_again(failures: list[Reply | None]) -> None:
    def reply(question: str, number: int) -> Reply | None:
        return failures[number - 1] if number <= len(failures) else likes_good(question, number)

    with judge_server(reply) as served:
        endpoint = ChatEndpoint(settings(served.url, concurrency=1))
        judged = list(judge_by_endpoint(endpoint, read_template(None), PAIRS, 1))
    assert [found.verdict for found in judged] == ["win", "loss", "tie", "tie"]
    assert endpoint.num_retries == len(failures)
    assert len(served.requests) == 8 + len(failures)


def test_waits_double_and_heed_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    def reply(question: str, number: int) -> Reply:
        asked = {2: "7", 4: "100000"}.get(number)
        return 429, "", {"Retry-After": asked} if asked else {}

    with judge_server(reply) as served:
        config = EndpointConfig(endpoint=served.url, model="j", retries=4, backoff_seconds=1.0)
        endpoint = ChatEndpoint(config)
        monkeypatch.setattr(endpoint, "_closed", Clock())
        with pytest.raises(ValueError, match="after 5 requests: status 429"):
            endpoint.ask("?")
        endpoint.close()
    assert (waits[1], waits[3]) == (7.0, 60.0)
    assert 0.75 <= waits[0] <= 1.25
    assert 3.0 <= waits[2] <= 5.0


def failing(reply: Callable[[str, int], Reply | None], **values: object) -> tuple[str, Served]:
    with judge_server(reply) as served, pytest.raises(ValueError, match="judge") as caught:
        judge(served.url, concurrency=1, **values)
    return str(caught.value), served


def test_an_endpoint_that_stays_broken_ends_it_in_one_line() -> None:
    message, served = failing(
        lambda q, n: (500, '{"error": {"message": "no\\nGPU"}}', {}), retries=2
    )
    assert (
        message
        == f"judge.endpoint: {served.url}/chat/completions after 3 requests: status 500: no GPU"
    )
    assert len(served.requests) == 3


def test_a_refusal_is_not_asked_again_and_never_shows_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    message, served = failing(
        lambda q, n: (401, '{"error": {"message": "bad key sk-secret"}}', {}),
        key_variable="JUDGE_KEY",
    )
    assert message.endswith("status 401: bad key [key]")
    assert len(served.requests) == 1
    assert served.requests[0][1]["authorization"] == "Bearer sk-secret"


def test_after_a_refusal_nothing_more_is_sent() -> None:
    with judge_server(lambda question, number: (403, "not yours", {})) as served:
        endpoint = ChatEndpoint(settings(served.url))
        for _ in range(2):
            with pytest.raises(ValueError, match="status 403: not yours"):
                endpoint.ask("?")
        endpoint.close()
    assert len(served.requests) == 1


def test_all_threads_give_up_for_the_one_reason() -> None:
    def reply(question: str, number: int) -> Reply:
        return (429, "", {}) if number < 3 else (403, "not yours", {})

    with judge_server(reply) as served, pytest.raises(ValueError, match="status 403: not yours"):
        judge(served.url, PAIRS, concurrency=4, retries=1000)


def test_a_request_under_way_gets_its_answer_when_another_is_refused() -> None:
    both_asked, stopped = threading.Barrier(2), threading.Event()

    def reply(question: str, number: int) -> Reply:
        both_asked.wait()
        if answers(question) == (PAIRS[0].model, PAIRS[0].baseline):
            return 403, "not yours", {}
        stopped.wait()
        return chat("[[tie]]")

    with judge_server(reply) as served:
        endpoint = ChatEndpoint(settings(served.url, timeout_seconds=2.0))
        stop, close = endpoint.stop, endpoint.close
        endpoint.stop = lambda: (stop(), stopped.set())  # type: ignore[assignment, func-returns-value]
        endpoint.close = lambda: (stopped.set(), close())  # type: ignore[assignment, func-returns-value]
        with pytest.raises(ValueError, match="status 403: not yours"):
            list(judge_by_endpoint(endpoint, read_template(None), PAIRS[:2], concurrency=2))
    assert endpoint.num_retries == 0, "nobody waited until its time was over"


def test_no_key_is_sent_unless_its_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server(likes_good) as served:
        judge(served.url)
    assert all("authorization" not in headers for _, headers, _ in served.requests)


def test_nothing_but_the_question_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Ours: ours")
    with judge_server(likes_good) as served:
        judge(served.url)
    names = {name.lower() for _, headers, _ in served.requests for name in headers}
    assert names == {
        *("host", "accept", "accept-encoding", "connection"),
        *("content-type", "content-length", "user-agent", "x-stainless-raw-response"),
    }
    assert "ours" not in str([headers for _, headers, _ in served.requests])


def test_a_redirection_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server(likes_good) as other:
        message, _ = failing(
            lambda question, number: (307, "", {"Location": f"{other.url}/chat/completions"})
        )
    assert "status 307" in message
    assert other.requests == []


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_endpoint, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^judge: openai is not installed: pip install 'fasta"):
        ChatEndpoint(settings("http://here/v1"))


def test_a_server_that_is_down_is_said_at_once() -> None:
    with judge_server(likes_good) as served:
        pass
    with pytest.raises(ValueError, match="ConnectError") as caught:
        judge(served.url, retries=5)
    assert str(caught.value).startswith(f"judge.endpoint: {served.url}/chat/completions: no answer")


def test_a_server_that_goes_down_later_is_tried_again() -> None:
    with judge_server(likes_good) as served:
        endpoint = ChatEndpoint(settings(served.url, retries=2))
        endpoint.ask(fill(read_template(None), "p", "a", "b"))
    with pytest.raises(ValueError, match="after 3 requests: no answer"):
        endpoint.ask("?")
    endpoint.close()


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "dripping"])
def test_a_request_has_a_limit_of_time(drips: bool, status: int) -> None:
    over = threading.Event()

    def pieces() -> Iterator[str]:
        while not over.wait(0.005):
            yield " "

    def reply(question: str, number: int) -> Reply | None:
        if drips:
            return status, pieces(), {}
        over.wait()
        return None

    with judge_server(reply) as served:
        with pytest.raises(ValueError, match=r"completions: no answer within 0\.1 seconds$"):
            judge(served.url, PAIRS[:1], timeout_seconds=0.1, retries=0)
        over.set()


def test_so_many_pairs_are_under_way_and_no_more() -> None:
    active, peak, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2, timeout=60)

    def reply(question: str, number: int) -> Reply:
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
        together.wait()  # passes only if a second request is under way
        with lock:
            active -= 1
        return likes_good(question, number)

    with judge_server(reply) as served:
        judge(served.url, PAIRS * 2, concurrency=2)
    assert peak == 2


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("[[A]]", "A"),
        ("I weighed [[A]] and [[tie]].\n[[ b ]]\n", "B"),
        ("<think>[[A]]?</think> [[TIE]]", "tie"),
        (" B.\n", "B"),
        ("tie", "tie"),
        ("A is better", None),
        ("[[C]]", None),
        ("", None),
    ],
)
def test_verdicts_are_read(answer: str, verdict: str | None) -> None:
    assert read_verdict(answer) == verdict


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("tie", "tie", "tie"),
        ("A", "A", "tie"),
        ("tie", "B", "tie"),
        ("A", None, None),
        (None, "B", None),
    ],
)
def test_a_verdict_must_survive_both_orders(
    first: str | None, second: str | None, verdict: str | None
) -> None:
    assert both_orders(first, second) == verdict


def test_the_question_is_replaceable_and_deaf_to_what_stands_in_it(tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text("{prompt}|{answer_a}|{answer_b}|{other}")
    template = read_template(str(file))
    assert fill(template, "{answer_a}", "{answer_b}", r"\1") == r"{answer_a}|{answer_b}|\1|{other}"
    file.write_text("{prompt} {answer_a}")
    with pytest.raises(ValueError, match=r"question\.txt: expected \{answer_b\} in it"):
        read_template(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_template(str(file))
    with pytest.raises(FileNotFoundError, match=r"judge\.template: no such file"):
        read_template(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"endpoint": "localhost:8000/v1"}, "expected an address such as http"),
        ({"endpoint": "ftp://here/v1"}, "expected an address such as http"),
        ({"endpoint": "http://[::1"}, "expected an address such as http"),
        ({"endpoint": "http://me:word@here/v1"}, "without user, password"),
        ({"endpoint": "http://here/v1?key=1"}, "without user, password"),
        ({"model": None}, "expected the judge's name"),
        ({"key_variable": "NO_SUCH_KEY"}, "the environment has no NO_SUCH_KEY"),
        ({"key_variable": "ODD_KEY"}, "ODD_KEY holds characters"),
        ({"concurrency": 0}, "judge.concurrency: expected at least 1, got 0"),
        ({"retries": -1}, "judge.retries: expected at least 0, got -1"),
        ({"timeout_seconds": 0.0}, "judge.timeout_seconds: expected a positive number"),
        ({"backoff_seconds": float("nan")}, "judge.backoff_seconds: expected at least 0"),
    ],
)
def test_settings_that_cannot_work_are_named(
    values: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD_KEY", "a\nb")
    with pytest.raises(ValueError, match=message):
        ChatEndpoint(EndpointConfig(**{"endpoint": "http://here/v1", "model": "j", **values}))  # type: ignore[arg-type]
