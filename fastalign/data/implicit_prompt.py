"""The prompt of a pair that does not name it: what both sides begin with."""

import os

from fastalign.data.conversation import Message
from fastalign.data.readers.row import DataFault

# Anthropic's hh-rlhf writes whole dialogues as text; a reply starts after this mark.
_REPLY_MARK = "\n\nAssistant:"


def split_text(where: str, column: str, first: str, second: str) -> tuple[str, str, str]:
    r"""`(prompt, first response, second response)` of two texts with a common beginning.

    The cut is after the last common `\n\nAssistant:`, else before the word in which the texts
    part, so that both responses start at the same whole word.

    Raises:
        DataFault: there is no common beginning, or nothing follows it on one side.
    """
    common = os.path.commonprefix([first, second])  # noqa: RUF071 (characters are meant)
    mark = common.rfind(_REPLY_MARK)
    if mark >= 0:
        cut = mark + len(_REPLY_MARK)
    else:
        cut = max((index for index, letter in enumerate(common) if letter.isspace()), default=0)
    if not first[:cut].strip():
        problem = "no prompt column, and the two sides have no common beginning to serve as one"
        raise DataFault(where, problem, column)
    if not first[cut:].strip() or not second[cut:].strip():
        raise DataFault(where, "nothing follows what the two sides have in common", column)
    return first[:cut], first[cut:], second[cut:]


def split_messages(
    where: str, column: str, first: tuple[Message, ...], second: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """`(prompt, first response, second response)`: the prompt is all messages in common.

    Raises:
        DataFault: there are none in common, or nothing follows them on one side.
    """
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    if count == 0:
        problem = "no prompt column, and the two sides have no first message in common"
        raise DataFault(where, problem, column)
    if count == len(first) or count == len(second):
        raise DataFault(where, "nothing follows what the two sides have in common", column)
    return first[:count], first[count:], second[count:]
