"""What a server said of a failure, in few words."""

import json


def shorten(text: str) -> str:
    """The message in a server's answer, or the answer itself, on one line of 200 characters."""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        pass
    words = " ".join(text.split()) or "no text"
    return words if len(words) <= 200 else words[:197] + "..."
