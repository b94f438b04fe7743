"""Who may see the page: keys, cookies, signed forms, and a guard in front of every request.

A key in a link is exchanged for a cookie, which scripts cannot read and other sites cannot send.
What a form says about the pair that it shows is signed, so that a vote tells what was shown.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from fastalign.compare.store import Annotator, ChosenBy, Side

MOST_BODY_BYTES = 64 * 2**10
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: under it a browser sends `Origin: null` with the page's own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Shown:
    """A pair as it is shown to an annotator.

    Attributes:
        pair: id of the pair.
        left: the answer on the left.
        chosen_by: how it was chosen.
        milliseconds: time of showing it, since 1970.
        nonce: random text that is new with each form.
    """

    pair: int
    left: Side
    chosen_by: ChosenBy
    milliseconds: int
    nonce: str

    def signed(self, key: str) -> str:
        """Return it as one text that only the holder of the key can have made."""
        text = f"{self.pair}.{self.left}.{self.chosen_by}.{self.milliseconds}.{self.nonce}"
        return f"{text}.{digest(key, text)}"


def digest(key: str, text: str) -> str:
    """Return the HMAC-SHA256 of a text in hexadecimal."""
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


def new_nonce() -> str:
    """Return a random text of 32 hexadecimal digits."""
    return secrets.token_hex(16)


def read_shown(text: str, key: str) -> Shown | None:
    """Return what a form says was shown; None unless it was signed with this key."""
    said, _, signature = text.rpartition(".")
    parts = said.split(".")
    # Bytes, since a text of other characters than ASCII cannot be compared.
    if len(parts) != 5 or not hmac.compare_digest(signature.encode(), digest(key, said).encode()):
        return None
    pair, left, chosen_by, milliseconds, nonce = parts
    assert left in get_args(Side)
    assert chosen_by in get_args(ChosenBy)
    return Shown(int(pair), left, chosen_by, int(milliseconds), nonce)  # type: ignore[arg-type]


class Keys:
    """The annotators who have a key, by their keys and by their cookies.

    Args:
        annotators: those who may compare.
        owner: who sees the results; one who compares alone, or somebody without votes.
    """

    def __init__(self, annotators: Iterable[Annotator], owner: Annotator):
        self.owner = owner
        self.annotators = list(annotators)
        known = {person.id: person for person in (*self.annotators, owner)}
        self._by_key = {str(person.key): person for person in known.values()}
        self._by_cookie = {self.cookie_of(person): person for person in known.values()}

    @staticmethod
    def cookie_of(person: Annotator) -> str:
        """Return the cookie's value, from which the key cannot be found."""
        assert person.key is not None
        return digest(person.key, "cookie")

    def by_key(self, key: str) -> Annotator | None:
        """Return who has this key, or None."""
        return _constant_time(self._by_key, key)

    def by_cookie(self, value: str | None) -> Annotator | None:
        """Return who has a cookie of this value, or None."""
        return _constant_time(self._by_cookie, value or "")

    def compares(self, person: Annotator) -> bool:
        """Return whether a person is asked to compare, and does not only see the results."""
        return any(person.id == other.id for other in self.annotators)


def _constant_time(known: dict[str, Annotator], given: str) -> Annotator | None:
    """Look a secret up without an answer's time telling how much of it is right."""
    found = None
    for secret, person in known.items():
        if hmac.compare_digest(secret.encode(), given.encode()):
            found = person
    return found


class Guard:
    """ASGI middleware: refuses other sites' requests and large bodies, and sets the headers.

    A request that changes something has to come from a page of this server: its `Origin` is
    compared with `Host`, which Starlette's TrustedHostMiddleware has checked before.
    """

    def __init__(self, app: Any, *, scheme: str = "http"):
        self._app = app
        self._scheme = scheme

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request, or refuse it with 403, 411 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                # A page may bring a policy of its own.
                own = {name for name, _ in message["headers"]}
                more = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                more = [(k, v) for k, v in more if k not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refusal = self._refusal(scope["method"], headers)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
            return
        status, text = refusal
        start = {"type": "http.response.start", "status": status}
        kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send_with_headers({**start, "headers": kind})
        await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        if method in ("GET", "HEAD"):
            return None
        if headers.get("origin") != f"{self._scheme}://{headers.get('host')}":
            return 403, "this request does not come from a page of this server"
        length = headers.get("content-length", "")
        if not length.isdigit():  # a body in chunks has no length that could be compared
            return 411, "expected a Content-Length"
        if int(length) > MOST_BODY_BYTES:
            return 413, f"expected at most {MOST_BODY_BYTES} bytes"
        return None
