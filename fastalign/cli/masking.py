"""Keep secrets out of settings and output; they belong in environment variables."""

import os
import re
from collections.abc import Sequence

_USER = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s/?#'\"]*@")
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:token|key|secret|password|signature|credential)=)[^\s&#'\"]+", re.IGNORECASE
)
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD)$")
_SHORTEST = 8  # shorter values may be words


def masked(text: str) -> str:
    """Return the text without passwords in URLs, secrets in queries, and secret variables' values.

    A variable is secret if the last word of its name is TOKEN, KEY, SECRET or PASSWORD.
    """
    text = _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))
    for name, value in os.environ.items():
        if _VARIABLE.search(name.upper()) and len(value) >= _SHORTEST:
            text = text.replace(value, f"[{name}]")
    return text


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuse settings with a secret, since they are printed and saved in the run's folder.

    Raises:
        ValueError: if a setting holds a secret; the message names it without its value.
    """
    flag = "the first argument"
    for word in arguments:
        own, equals, _ = word.partition("=")
        flag = own if word.startswith("--") and (equals or masked(own) == own) else flag
        if masked(word) != word:
            raise ValueError(
                f"{flag}: holds a password or a token, and settings are saved and printed; "
                "expected it in an environment variable, such as HF_TOKEN"
            )
