"""Text that is safe to show: without control characters, and without secrets.

Data rows, file names, templates and libraries' messages reach the terminal, the log and the report.
Every command prints through `safe_output`, and every page is filled through `shown`.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from typing import Any, TextIO, cast

# C0 and C1 controls except tab and line feed, marks that reorder or hide text, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0001\U000e0020-\U000e007f]"
)
_USER = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s/?#'\"]*@")
_NAMES = (
    "token|key|key-?id|secret|password|passwd|passphrase|pwd|signature|sig|credentials?|auth|"
    "authorization|jwt|sas|session"
)
_QUERY = re.compile(rf"([?&;][\w.-]*(?:{_NAMES})=)[^\s&#'\"]+", re.IGNORECASE)
# Any other value of a query that is as long and as mixed as a key.
_LONG_VALUE = re.compile(r"([?&;][\w.-]+=)(?=[^\s&#'\"]*\d)(?=[^\s&#'\"]*[a-zA-Z])[\w%+/=~-]{32,}")
_KNOWN = re.compile(  # of Hugging Face, GitHub, GitLab, OpenAI and Anthropic, Slack, AWS; JWT
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"glpat-[\w-]{20,}|sk-(?:proj-|ant-|live-)?[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}|"
    r"A(?:KIA|SIA)[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD)$")
_SHORTEST = 8  # shorter values may be words
# Beginnings of libraries' messages that ask for nothing useful, by their loggers.
NOISE = {  # bitsandbytes works without this package
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


def visible(text: str) -> str:
    r"""Return the text with control and bidirectional characters as escapes such as `\x1b`.

    Tabs and line feeds are kept.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _is_secret(variable: str) -> bool:
    return _VARIABLE.search(variable.upper()) is not None


def masked(text: str) -> str:
    """Return the text without passwords in URLs, secrets in queries, tokens, and secret variables.

    A variable is secret if the last word of its name is TOKEN, KEY, SECRET or PASSWORD.
    """
    text = _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))
    text = _LONG_VALUE.sub(r"\1***", text)
    if len(text) >= _SHORTEST:  # others hold none of these values
        for name in filter(_is_secret, os.environ):
            value = os.environ.get(name, "")
            text = text.replace(value, f"[{name}]") if len(value) >= _SHORTEST else text
    return _KNOWN.sub("***", text)


def shown(text: str) -> str:
    """Return the text as a terminal, a log or a page may show it."""
    return visible(masked(text))


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag with a secret, since settings are printed and saved.

    The message names the flag without its value.
    """
    flag = "the first argument"
    for word in arguments:
        own, equals, _ = word.partition("=")
        flag = own if word.startswith("--") and (equals or masked(own) == own) else flag
        if masked(word) != word:
            raise _secret(flag)


def refuse_secret_settings(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError for a nested setting with a secret, as `refuse_secrets` does for flags."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_secret_settings(value, f"{prefix}{name}.")
        elif masked(str(value)) != str(value):
            raise _secret(f"{prefix}{name}")


def _secret(name: str) -> ValueError:
    return ValueError(
        f"{name}: holds a password or a token, and settings are saved and printed; "
        "expected it in an environment variable, such as HF_TOKEN"
    )


@cache
def quiet_libraries() -> None:
    """Drop the messages of NOISE."""
    for name, text in NOISE.items():
        logging.getLogger(name).addFilter(partial(_is_other, text))


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    """Return False for a record whose message has this beginning, so that it is dropped."""
    return not str(record.msg).startswith(beginning)


class _Around:
    """A text stream around another, of which everything but writing is passed on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        raise NotImplementedError

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream itself."""
        return getattr(self._stream, name)


class SafeStream(_Around):
    """A text stream whose writes are passed through `shown`."""

    @property
    def rich_proxied_file(self) -> TextIO:
        """The innermost stream, to which rich writes bars and tables with escapes of its own."""
        stream: TextIO = getattr(self._stream, "rich_proxied_file", self._stream)
        return stream

    def write(self, text: str) -> int:
        """Write the text; a carriage return in front, of a library's progress bar, is kept."""
        start = "\r" if text.startswith("\r") else ""
        self._stream.write(start + shown(text.removeprefix("\r")))
        return len(text)


class LossyStream(_Around):
    """A text stream that drops what cannot be written: to a closed pipe, a full disk, a terminal.

    What comes later is tried again, since a disk may have room by then. Each line is flushed.
    """

    is_lossy = True  # also of a stream around it

    def write(self, text: str) -> int:
        """Write text, if it can be."""
        with suppress(OSError):
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be done."""
        with suppress(OSError):
            self._stream.flush()


def plain_stream(stream: TextIO) -> TextIO:
    """Return the stream below a `SafeStream`, for text that has escapes of our own."""
    return stream.rich_proxied_file if isinstance(stream, SafeStream) else stream


@contextmanager
def safe_output() -> Iterator[None]:
    """Pass everything that is printed to `sys.stdout` and `sys.stderr` through `shown`.

    A stream that the caller closed (`>&-`) becomes the null device.
    """
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if stream is None or getattr(stream, "closed", False):
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            if not isinstance(stream, SafeStream):
                stack.enter_context(redirect(cast(TextIO, SafeStream(stream))))
        yield


@contextmanager
def lossy_output() -> Iterator[None]:
    """Lose what cannot be printed to `sys.stdout` and `sys.stderr`: it is never essential to a run.

    Libraries that take these when they write, such as rich, are covered too.
    """
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if stream is not None and not getattr(stream, "is_lossy", False):
                stack.enter_context(redirect(cast(TextIO, LossyStream(stream))))
        yield


def occupy_standard_descriptors() -> None:
    """Open the null device in place of standard streams that the caller closed.

    Otherwise the next files that are opened take their numbers, and what a library prints in C goes
    into them.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)


def give_up_unwritten() -> None:
    """Flush stdout and stderr; give up what cannot be written.

    The interpreter would try again at its end, and make the exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
