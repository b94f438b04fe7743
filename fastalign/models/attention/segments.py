"""The segments of a packed row: which tokens attend to which, for every implementation.

A row is a sequence of segments: a prompt, its responses, the next prompt, and so on. A segment
attends to itself causally; a response also attends to all of its prompt, and never to a sibling. A
prompt with one response is one segment with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.batch.packed import Layout


@dataclass(frozen=True)
class ScoreForm:
    """A layer's transformation of its attention scores.

    Attributes:
        scaling: factor of query-key products; None: 1 / sqrt(head size).
        window: number of keys that a query sees, up to its own position; None: all.
        softcap: c of c * tanh(score / c); None: no softcap.
        sinks: (H,), for each query head the score of a key without a value; None: no sinks.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def scale(self, head_size: int) -> float:
        """Return the scaling for a head size."""
        return head_size**-0.5 if self.scaling is None else self.scaling


@dataclass(frozen=True)
class Segments:
    """The segments of one row, in its order, on the host; S segments, T tokens.

    Attributes:
        start: (S,) int64, first token.
        length: (S,) int64.
        prompt_start: (S,) int64, first token of a response's prompt; of a prompt: its own.
        prompt_length: (S,) int64; of a prompt: 0.
        number: (S,) int64, 0 for a prompt, 1.. for its responses, which follow it.
    """

    start: Tensor
    length: Tensor
    prompt_start: Tensor
    prompt_length: Tensor
    number: Tensor

    @property
    def num_tokens(self) -> int:
        """T: tokens of the row."""
        return int(self.start[-1] + self.length[-1])

    def per_token(self, values: Tensor) -> Tensor:
        """Repeat a value of each segment (S,) for each of its tokens, (T,)."""
        return torch.repeat_interleave(values, self.length, output_size=self.num_tokens)


def row_segments(layout: Layout) -> Segments:
    """Return the segments of a batch's layout, which covers its row without gaps."""
    num_responses = Counter(layout.response_prompt)
    rows, counts = [], [0] * len(layout.prompt_bounds)
    for (start, stop), group in zip(layout.response_bounds, layout.response_prompt, strict=True):
        first, last = layout.prompt_bounds[group]
        if num_responses[group] == 1:
            rows.append((first, stop - first, first, 0, 0))
            continue
        if counts[group] == 0:
            rows.append((first, last - first, first, 0, 0))
        counts[group] += 1
        rows.append((start, stop - start, first, last - first, counts[group]))
    segments = Segments(*torch.tensor(sorted(rows)).unbind(1))
    ends = segments.start + segments.length
    assert torch.equal(segments.start[1:], ends[:-1]), "segments follow one another"
    return segments
