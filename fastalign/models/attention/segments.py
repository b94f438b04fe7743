"""Which tokens attend to which in a packed row, and how, as every implementation reads it.

A row is a sequence of segments: a prompt, its responses, the next prompt, and so on. A segment
attends to itself causally; a response also attends to all of its prompt, and never to a sibling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.batch.packed import Layout


@dataclass(frozen=True)
class ScoreForm:
    """What a layer makes of its scores, whichever implementation computes them.

    Attributes:
        scaling: of queries times keys; None: 1 / sqrt(head size).
        window: how many keys back a query sees, itself included; None: all.
        softcap: c of c * tanh(score / c); None: none.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None

    def scale(self, head_size: int) -> float:
        """The scaling of heads of a size."""
        return head_size**-0.5 if self.scaling is None else self.scaling


@dataclass(frozen=True)
class Segments:
    """The segments of one row, in its order, on the host; S segments, T tokens.

    Attributes:
        start: (S,) int64, first token.
        length: (S,) int64.
        prompt_start: (S,) int64, a response's prompt's first token; of a prompt: its own.
        prompt_length: (S,) int64; of a prompt: 0.
        number: (S,) int64: 0 a prompt, 1.. the responses of the prompt before them.
    """

    start: Tensor
    length: Tensor
    prompt_start: Tensor
    prompt_length: Tensor
    number: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.start[-1] + self.length[-1])

    def of_tokens(self, values: Tensor) -> Tensor:
        """A value (S,) of each segment for each of its tokens, (T,)."""
        return torch.repeat_interleave(values, self.length, output_size=self.num_tokens)


def segments_of(layout: Layout) -> Segments:
    """Reads the segments off a batch's layout, which covers its row without gaps."""
    rows = [(start, stop - start, start, 0, 0) for start, stop in layout.prompt_bounds]
    counts = [0] * len(rows)
    for (start, stop), group in zip(layout.response_bounds, layout.response_prompt, strict=True):
        counts[group] += 1
        first, last = layout.prompt_bounds[group]
        rows.append((start, stop - start, first, last - first, counts[group]))
    segments = Segments(*torch.tensor(sorted(rows)).unbind(1))
    ends = segments.start + segments.length
    assert torch.equal(segments.start[1:], ends[:-1]), "segments follow one another"
    return segments
