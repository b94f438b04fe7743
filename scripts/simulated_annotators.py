"""Compare on the page of `fastalign compare` as people would, by a reward, and time the answers.

Each link is one annotator, with its own thread and connection. A verdict is drawn from Rao and
Kupper's model of the difference of the two answers' rewards, so that ties and mistakes occur.

    python scripts/simulated_annotators.py LINK [LINK ...] --reward reward.json [--votes 400]
"""

import argparse
import http.client
import math
import random
import statistics
import sys
import threading
import time
from contextlib import closing
from html.parser import HTMLParser
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit

import torch

from fastalign.data.conversation import json_as_content
from fastalign.evaluation.rewards import RewardFunction, apply_reward, load_reward
from fastalign.losses.reward import rao_kupper_outcomes

ROLES = {"Instructions": "system", "Person": "user", "Assistant": "assistant", "Tool": "tool"}


class ShownPair(HTMLParser):
    """The prompt, the two answers and the form of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.sections: list[list[tuple[str | None, str]]] = []  # speaker and text of each turn
        self.form: dict[str, str] = {}
        self._text: list[str] | None = None
        self._speaker: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a section or a text."""
        found = dict(attrs)
        name = found.get("class") or ""
        if tag == "section" and name in ("prompt", "answer"):
            self.sections.append([])
        elif name in ("text", "speaker", "empty"):
            self._text = []
        elif tag == "input" and found.get("name") == "shown":
            self.form["shown"] = found.get("value") or ""

    def handle_data(self, data: str) -> None:
        """Add to the text."""
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        """End a text."""
        if self._text is None or tag not in ("div", "p"):
            return
        text, self._text = "".join(self._text), None
        if tag == "p" and text in ROLES:
            self._speaker = ROLES[text]
        elif self.sections:
            self.sections[-1].append((self._speaker, "" if tag == "p" else text))
            self._speaker = None

    def prompt(self) -> Any:
        """Return the prompt: text, or a list of {role, content}."""
        turns = self.sections[0]
        if turns[0][0] is None:
            return turns[0][1]
        return [{"role": role, "content": text} for role, text in turns]

    def answers(self) -> list[str]:
        """Return the answers on the left and on the right."""
        return ["\n".join(text for _, text in turns) for turns in self.sections[1:3]]


class Visitor:
    """A browser's connection to the page, with its cookie; scripts of the page send forms so."""

    def __init__(self, link: SplitResult):
        self._origin = f"{link.scheme}://{link.netloc}"
        self._connection = http.client.HTTPConnection(link.netloc, timeout=60)
        self._cookie = ""
        self._cookie = self._ask("GET", f"/?{link.query}")[1].partition(";")[0]

    def _ask(self, method: str, path: str, body: str | None = None) -> tuple[str, str]:
        headers = {"Origin": self._origin, "X-Requested-With": "fetch", "Cookie": self._cookie}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        self._connection.request(method, path, body, headers)
        reply = self._connection.getresponse()
        text = reply.read().decode()
        if reply.status != 200:
            raise ValueError(f"{method} {path.partition('?')[0]}: {reply.status}: {text:.200}")
        return text, reply.getheader("set-cookie", "")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def page(self) -> str:
        """Return the first page."""
        return self._ask("GET", "/")[0]

    def send(self, path: str, fields: dict[str, str]) -> str:
        """Send a form and return the page that comes next."""
        return self._ask("POST", path, urlencode(fields))[0]


class Annotator(threading.Thread):
    """One person: opens a link, and compares until nothing is left or enough is done."""

    def __init__(self, link: str, reward: RewardFunction, options: argparse.Namespace, number: int):
        super().__init__()
        self._link, self._reward, self._options = link, reward, options
        self._random = random.Random(f"{options.seed}/{number}")
        self.seconds: list[float] = []
        self.problem: str | None = None

    def run(self) -> None:
        """Compare; a problem is kept for the end."""
        until = time.monotonic() + self._options.seconds
        try:
            with closing(Visitor(urlsplit(self._link))) as visitor:
                page = visitor.page()
                while len(self.seconds) < self._options.votes and time.monotonic() < until:
                    pair = ShownPair(page)
                    if not pair.form:
                        return
                    form = pair.form | {"verdict": self._verdict(pair)}
                    begin = time.perf_counter()
                    page = visitor.send("/vote", form)
                    self.seconds.append(time.perf_counter() - begin)
                    if "Saved." not in page:
                        raise ValueError("a vote was not saved")
                    if self._options.pause:
                        time.sleep(self._random.expovariate(1 / self._options.pause))
        except (http.client.HTTPException, OSError, ValueError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _verdict(self, pair: ShownPair) -> str:
        prompt, answers = json_as_content(pair.prompt()), pair.answers()
        left, right = apply_reward(self._reward, [prompt, prompt], answers, "reward")
        difference = torch.tensor([self._options.scale * (left - right)], dtype=torch.float64)
        shares = rao_kupper_outcomes(difference, nu=self._options.nu).exp()[0].tolist()
        return self._random.choices(("left", "right", "tie"), shares)[0]


def main() -> int:
    """Run all annotators; print what was done and how fast; return 1 if one had a problem."""
    parser = argparse.ArgumentParser(description="Compare on a page by a reward.")
    parser.add_argument("links", nargs="+", help="links that `fastalign compare` printed")
    parser.add_argument("--reward", required=True, help="module:function, folder or .json file")
    parser.add_argument("--votes", type=int, default=sys.maxsize, help="most votes of each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="longest time")
    parser.add_argument("--pause", type=float, default=0, help="mean seconds between verdicts")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the rewards")
    parser.add_argument("--nu", type=float, default=1.5, help="ties: 1.5 is 20 %% of equal answers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reward = load_reward(options.reward)
    people = [Annotator(link, reward, options, n) for n, link in enumerate(options.links)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    seconds = sorted(second for person in people for second in person.seconds)
    print(f"{len(seconds)} votes of {len(people)} annotators")
    if seconds:
        late = seconds[min(len(seconds) - 1, math.ceil(0.95 * len(seconds)))]
        print(
            f"from verdict to next pair: median {statistics.median(seconds) * 1000:.1f} ms, "
            f"95 % below {late * 1000:.1f} ms, largest {seconds[-1] * 1000:.1f} ms"
        )
    problems = [person.problem for person in people if person.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
