"""Groups kept in Arrow columns, in memory or mapped from a file, and made when they are asked for.

A row of 254 tokens takes 0.5 to 1 KB there, and 8 KB as Python lists; ranks that map one file share
its pages.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fastalign.batch.packed import Group

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, length: int, item: Callable[[int], T]) -> None:
        self._length, self._item = length, item

    def __len__(self) -> int:
        """Return the number of items."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Return an item, or a list of those of a slice."""
        places = range(self._length)[index]
        return self._item(places) if isinstance(places, int) else [self._item(i) for i in places]


def joined(parts: Sequence[Sequence[T]]) -> Lazy[T]:
    """Return sequences as one, the items of the first in front."""
    ends = list(accumulate(map(len, parts)))

    def item(index: int) -> T:
        number = bisect_right(ends, index)
        return parts[number][index - ends[number] + len(parts[number])]

    return Lazy(ends[-1], item)


class StoredGroups(Lazy[Group]):
    """Groups in the columns that `group_columns` makes; each has as many responses as the others.

    Attributes:
        prompt_lengths: tokens of each prompt.
        response_lengths: tokens of each response, those of a group one after another.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        from pyarrow import compute

        super().__init__(len(table), self._group)
        self._table = table.select(list(GROUP_COLUMNS))
        self._prompts, self._responses, self._masks = map(table.column, GROUP_COLUMNS)
        responses = compute.list_flatten(self._responses)
        self.prompt_lengths = list_lengths(self._prompts)
        self.response_lengths = list_lengths(responses)

    @classmethod
    def joined(cls, parts: Sequence[StoredGroups]) -> StoredGroups:
        """Return the groups of several as one, without a copy; all have as many responses."""
        import pyarrow

        return cls(pyarrow.concat_tables([part._table for part in parts]))

    def _group(self, index: int) -> Group:
        masks = self._masks[index]
        return Group(
            _items(self._prompts[index].values),
            [_items(response) for response in _lists(self._responses[index].values)],
            [_items(mask) for mask in _lists(masks.values)] if masks.is_valid else None,
        )

    @property
    def num_responses(self) -> int:
        """Responses of each group."""
        return len(self.response_lengths) // max(len(self), 1)

    def lengths(self, *, share_prompts: bool) -> array[int]:
        """Return the packed tokens of each group, its prompt counted once or for each response."""
        prompts = 1 if share_prompts else self.num_responses
        return self._combined(lambda prompt, responses: prompts * prompt + sum(responses))

    def longest(self) -> array[int]:
        """Return the tokens of each group's prompt with its longest response."""
        return self._combined(lambda prompt, responses: prompt + max(responses))

    def _combined(self, combine: Callable[[int, tuple[int, ...]], int]) -> array[int]:
        sides = [self.response_lengths[n :: self.num_responses] for n in range(self.num_responses)]
        rows = zip(self.prompt_lengths, zip(*sides, strict=True), strict=True)
        return array("i", (combine(prompt, responses) for prompt, responses in rows))

    def used_ids(self) -> set[int]:
        """Return the token ids that occur."""
        from pyarrow import compute

        responses = compute.list_flatten(self._responses)
        flat = (compute.list_flatten(column) for column in (self._prompts, responses))
        return {number for ids in flat for number in compute.unique(ids).to_pylist()}

    def last_ids(self) -> set[int]:
        """Return the token ids that responses end with."""
        from pyarrow import compute

        responses = compute.list_flatten(self._responses)
        lasts = ((part.values, compute.subtract(part.offsets[1:], 1)) for part in responses.chunks)
        ends = (compute.unique(ids.take(places)) for ids, places in lasts)
        return {number for ids in ends for number in ids.to_pylist()}


GROUP_COLUMNS = ("prompt_ids", "response_ids", "response_loss_mask")


def stored(groups: Sequence[Group]) -> StoredGroups:
    """Return the groups in columns, as they are if they are there already."""
    import pyarrow

    if isinstance(groups, StoredGroups):
        return groups
    fields = group_fields(2**31)
    return StoredGroups(pyarrow.table(group_columns(groups, fields), schema=pyarrow.schema(fields)))


def group_fields(num_ids: int) -> list[pyarrow.Field]:
    """Return the fields of groups whose token ids are below `num_ids`."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.uint16() if num_ids <= 2**16 else pyarrow.int32())
    types = (ids, pyarrow.list_(ids), pyarrow.list_(pyarrow.list_(pyarrow.bool_())))
    return [pyarrow.field(name, kind) for name, kind in zip(GROUP_COLUMNS, types, strict=True)]


def group_columns(groups: Sequence[Group], fields: Sequence[pyarrow.Field]) -> dict[str, Any]:
    """Return the columns of groups, by name."""
    import pyarrow

    return {
        field.name: pyarrow.array([getattr(group, field.name) for group in groups], field.type)
        for field in fields
    }


def list_lengths(column: pyarrow.ChunkedArray) -> array[int]:
    """Return the length of each list of a column."""
    from pyarrow import compute

    return array("i", compute.list_value_length(column).to_numpy().tobytes())


def _items(values: pyarrow.Array) -> list[Any]:
    found: list[Any] = values.to_numpy(zero_copy_only=False).tolist()
    return found


def _lists(values: pyarrow.Array) -> list[pyarrow.Array]:
    return [scalar.values for scalar in values]
