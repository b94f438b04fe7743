"""Objects that stand where settings have paths: a model, rows or a reward that a caller holds.

Each is a text, `train_data (in memory)`, so that a setting with an object is printed, saved and
compared as one with a path. The few functions that open a path look for the object first; all else,
the checks of data and models among it, does not know the difference.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from os import PathLike
from tokenize import TokenError
from typing import Any


class NotGiven(str):
    """Default of a setting that has none: the command line requires its flag."""

    __slots__ = ()


NOT_GIVEN = NotGiven()


def is_given(value: object) -> bool:
    """Return whether a setting without a default has a value."""
    return not isinstance(value, NotGiven) and value != (NOT_GIVEN,)


HERE = " (in memory)"  # how the text of an object ends


class InMemory(str):
    """Base class of the objects in place of a path, which text it also is.

    Attributes:
        argument: name of the argument that the object was handed over by.
    """

    argument: str

    def __deepcopy__(self, memo: Any) -> "InMemory":
        """Return the same: a copy of settings is none of a model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the text alone: no object goes to another process with the settings."""
        return str, (str(self),)


class GivenModel(InMemory):
    """A model in memory; or a path to one, with a tokenizer that is not the path's.

    Attributes:
        model: model of transformers; None: it is read from the path that the text is.
        tokenizer: tokenizer of transformers, or its path; None: that of `model.name_or_path`.
    """

    model: Any
    tokenizer: Any

    def __new__(
        cls, argument: str, model: Any = None, tokenizer: Any = None, *, path: str | None = None
    ) -> "GivenModel":
        """Return the object; `path` is that of a model that is not in memory."""
        made = super().__new__(cls, f"{argument}{HERE}" if path is None else path)
        made.argument, made.model, made.tokenizer = argument, model, tokenizer
        return made


class GivenRows(InMemory):
    """Rows in memory, which can be read more than once.

    Attributes:
        rows: a `datasets.Dataset`, a list, or another iterable of dictionaries.
    """

    rows: Iterable[Any]

    def __new__(cls, argument: str, rows: Iterable[Any]) -> "GivenRows":
        """Return the object."""
        made = super().__new__(cls, f"{argument}{HERE}")
        made.argument, made.rows = argument, rows
        return made

    def num_rows(self) -> int | None:
        """Return their number; None: it is not known before they are read."""
        return len(self.rows) if isinstance(self.rows, Sized) else None

    def content(self) -> str | None:
        """Return what names their content, which a `datasets.Dataset` has; None: nothing does."""
        found = getattr(self.rows, "_fingerprint", None)
        return found if isinstance(found, str) and self.num_rows() is not None else None


class GivenReward(InMemory):
    """A reward function in memory.

    Attributes:
        function: (prompts, completions, columns by name) -> numbers.
    """

    function: Callable[..., Any]

    def __new__(cls, name: str, function: Callable[..., Any]) -> "GivenReward":
        """Return the object; `name` is the reward's in the metrics."""
        made = super().__new__(cls, f"{name}{HERE}")
        made.argument, made.function = name, function
        return made

    def source(self) -> str | None:
        """Return the function's source text; None where there is none, as for one in C."""
        function: Any = plain_function(self.function)
        for thing in (function, type(function)):
            try:
                return inspect.getsource(thing)
            except (TypeError, OSError, SyntaxError, TokenError):
                continue
        return None


def names_object(value: object) -> bool:
    """Return whether a setting has the text of an object, and not the object: as from a file."""
    is_text = isinstance(value, str) and not isinstance(value, InMemory)
    return is_text and str(value).endswith(HERE)


def plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without what `functools.wraps` and `functools.partial` put around it."""
    function = inspect.unwrap(function)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    return function


def model_of(path: object) -> Any:
    """Return the model in memory that stands in place of a path; None if it is a path."""
    return path.model if isinstance(path, GivenModel) else None


def origin(path: str) -> str:
    """Return the folder or hub name of a model; one in memory may know where it came from.

    Without that it is an empty text.
    """
    model = model_of(path)
    return path if model is None else str(getattr(model, "name_or_path", None) or "")


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Arguments of `fastalign.train_dpo` and its like beside the settings: paths, objects or None.

    Attributes:
        model: the model to train.
        tokenizer: its tokenizer.
        train_data: training rows.
        eval_data: held-out rows.
        reference: the frozen reference.
        teacher: the frozen teacher.
        reward: one or several rewards.
    """

    model: Any = None
    tokenizer: Any = None
    train_data: Any = None
    eval_data: Any = None
    reference: Any = None
    teacher: Any = None
    reward: Any = None


def as_model(argument: str, model: Any, tokenizer: Any = None) -> str:
    """Return what stands for a model: a path as it is, an object as a `GivenModel`.

    The result of a run (`fastalign.train_sft`) is its model with its tokenizer. A `tokenizer` of
    None is the model's own.

    Raises:
        ValueError: if the object is no model, or the tokenizer none.
    """
    if all(hasattr(model, name) for name in ("model", "tokenizer", "folder")):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if isinstance(tokenizer, PathLike):
        tokenizer = str(tokenizer)
    if not isinstance(tokenizer, str | None) and not hasattr(tokenizer, "decode"):
        raise ValueError(
            "tokenizer: expected a tokenizer of transformers, a folder or a hub name, got "
            f"{type(tokenizer).__name__}"
        )
    if not isinstance(model, str | PathLike):
        if not (hasattr(model, "config") and hasattr(model, "state_dict")):
            raise ValueError(
                f"{argument}: expected a transformers model, a folder or a hub name, got "
                f"{type(model).__name__}"
            )
        return GivenModel(argument, model, tokenizer)
    path = str(model)
    return path if tokenizer is None else GivenModel(argument, None, tokenizer, path=path)


def as_rows(argument: str, rows: Any) -> Any:
    """Return what stands for rows: a path as it is, several as a tuple, an object as a `GivenRows`.

    Rows that can be read only once, such as a generator's, are read into a list.

    Raises:
        ValueError: if the object is no iterable of rows.
    """
    if isinstance(rows, str | PathLike):
        return str(rows)
    if _are_paths(rows):
        if argument != "train_data":
            raise ValueError(f"{argument}: expected one file, folder or hub name, got {len(rows)}")
        return tuple(map(str, rows))  # with weights, as `data.train` has them
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, list(rows)[:8]))
        raise ValueError(
            f"{argument}: expected rows, a file, a folder or a hub name, got a "
            f"{type(rows).__name__} of {names}; hand over one of its values, or a list of rows"
        )
    if type(rows).__name__ == "DataFrame":
        raise ValueError(
            f"{argument}: expected rows, got a DataFrame; datasets.Dataset.from_pandas makes them"
        )
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"{argument}: expected a datasets.Dataset, an iterable of rows (dictionaries), a file, "
            f"a folder or a hub name, got {type(rows).__name__}"
        )
    return GivenRows(argument, list(rows) if isinstance(rows, Iterator) else rows)


def _are_paths(rows: Any) -> bool:
    """Return whether rows are none, but a tuple of texts, or a list of paths that exist."""
    if isinstance(rows, tuple):
        return all(isinstance(each, str | PathLike) for each in rows)
    return isinstance(rows, list) and bool(rows) and all(map(_is_path, rows))


def _is_path(thing: Any) -> bool:
    """Return whether something is a path, or the text of one that exists, with a weight or not."""
    if not isinstance(thing, str):
        return isinstance(thing, PathLike)
    places = (thing, thing.rpartition(":")[0] or thing)
    return any(os.path.exists(os.path.expanduser(place)) for place in places)


def as_rewards(rewards: Any) -> tuple[str, ...]:
    """Return what stands for one or several rewards: paths as they are, objects with their names.

    Raises:
        ValueError: if one is no path, no function and no model.
    """
    found: list[str] = []
    for reward in rewards if isinstance(rewards, list | tuple) else (rewards,):
        if isinstance(reward, str | PathLike):
            found.append(str(reward))
            continue
        if hasattr(reward, "state_dict") or hasattr(reward, "folder"):
            name, made = "reward", as_model("reward", reward)
        elif callable(reward):
            plain: Any = plain_function(reward)
            name = getattr(plain, "__name__", type(plain).__name__).strip("<>")
            made = GivenReward(name, reward)
        else:
            raise ValueError(
                "reward: expected a function (prompts, completions, columns by name) -> numbers, a "
                "reward model, its folder, module:function or a .json file, got "
                f"{type(reward).__name__}"
            )
        if made in found:  # settings tell rewards apart by their names
            made = _renamed(made, f"{name}-{len(found) + 1}")
        found.append(made)
    return tuple(found)


def _renamed(made: str, name: str) -> str:
    if isinstance(made, GivenModel):
        return GivenModel(name, made.model, made.tokenizer)
    assert isinstance(made, GivenReward)
    return GivenReward(name, made.function)
