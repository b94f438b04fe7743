"""Attention of sampling: a row of prompts first, then one token of every completion a step.

A prompt's keys and values are held once for all of its completions, and read once a step.

Legend: P prompts, S completions of each, R = P * S, H = h * g query heads for h key heads, d and e
sizes of a key and a value, K tokens of the longest prompt, n tokens of every completion so far.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.models.attention.choice import AttentionName
from fastalign.models.attention.plan import RowPlan
from fastalign.models.attention.segments import ScoreForm, Segments
from fastalign.models.attention.strips import product


class DecodingPlan(RowPlan):
    """The attention of prompts, and of their completions as these grow.

    The first forward is of the prompts, end to end in one row. Each further one is of R tokens, the
    next of every completion, a prompt's completions side by side.

    Args:
        lengths: number of tokens of each prompt.
        num_samples: S.
        num_new: the most tokens of a completion that follow.
        device: device of the tokens.
    """

    def __init__(
        self, lengths: Sequence[int], num_samples: int, num_new: int, device: torch.device
    ) -> None:
        length = torch.tensor(lengths)
        start, none = length.cumsum(0) - length, torch.zeros_like(length)
        super().__init__(Segments(start, length, start, none, none), device)
        offset = torch.arange(max(lengths))[None]
        index = start[:, None] + torch.minimum(offset, length[:, None] - 1)
        self._index, self._lengths = index.to(device), length.to(device)
        self._equal = min(lengths) == max(lengths)
        self._num_samples, self._num_new = num_samples, num_new
        self._layers: dict[int | None, _Layer] = {}
        self._biases: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        name: AttentionName,
        query: Tensor,  # (T, H, d) of the prompts, then (R, H, d)
        key: Tensor,  # (T, h, d), then (R, h, d)
        value: Tensor,  # (T, h, e), then (R, h, e)
        form: ScoreForm,
        layer: int | None = None,
    ) -> Tensor:  # (T, H, e), then (R, H, e)
        """Keep the layer's keys and values, and compute the attention of its queries."""
        if layer in self._layers:
            kept = self._layers[layer]
            bias = self._bias(kept.num_own + 1, form.window, query.dtype)
            return kept.attend(query, key, value, bias, form)
        prompts = key[self._index], value[self._index]
        self._layers[layer] = _Layer(*prompts, self._num_samples, self._num_new)
        return super().attend(name, query, key, value, form)

    def _bias(self, num_own: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return (P, 1, K + n), 0 or -inf for the newest of n own tokens; None: it sees all."""
        num_prompt = self._index.shape[1]
        if self._equal and (window is None or num_prompt + num_own <= window):
            return None
        if (num_own, window) not in self._biases:
            self._biases = {k: v for k, v in self._biases.items() if k[0] == num_own}
            lengths, device = self._lengths[:, None], self._device
            prompt = torch.arange(num_prompt, device=device)
            own = lengths + torch.arange(num_own, device=device)
            hidden = torch.cat([(prompt >= lengths), torch.zeros_like(own, dtype=torch.bool)], 1)
            if window is not None:
                position = torch.cat([prompt.expand(len(lengths), -1), own], 1)
                hidden |= position <= lengths + num_own - 1 - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._biases[num_own, window] = bias.masked_fill_(hidden, float("-inf"))[:, None]
        return self._biases[num_own, window]


class _Layer:
    """One layer's keys and values: those of prompts, and room for those of completions."""

    def __init__(
        self,
        key: Tensor,  # (P, K, h, d)
        value: Tensor,  # (P, K, h, e)
        num_samples: int,
        num_new: int,
    ) -> None:
        num_prompts, _, heads, _ = key.shape
        self._shape = num_prompts, heads, num_samples
        self._prompts = [rows.transpose(1, 2).flatten(0, 1) for rows in (key, value)]
        self._own = [rows.new_empty(*self._shape, num_new, rows.shape[3]) for rows in (key, value)]
        self.num_own = 0

    def attend(
        self,
        query: Tensor,  # (R, H, d)
        key: Tensor,  # (R, h, d)
        value: Tensor,  # (R, h, e)
        bias: Tensor | None,  # (P, 1, K + n)
        form: ScoreForm,
    ) -> Tensor:  # (R, H, e)
        """Write each completion's newest key and value; return the attention of its query."""
        (num_prompts, heads, num_samples), place = self._shape, self.num_own
        self.num_own += 1
        for rows, new in zip(self._own, (key, value), strict=True):
            of_prompt = new.view(num_prompts, num_samples, heads, -1)
            rows[:, :, :, place] = of_prompt.transpose(1, 2)
        keys, values = (rows[:, :, :, : self.num_own].flatten(0, 2) for rows in self._own)
        prompt_keys, prompt_values = self._prompts
        size, num_prompt, num_rows = query.shape[2], prompt_keys.shape[1], len(keys)
        # A prompt's completions are the queries of one product: (P, S, h, g, d) to (P, h, S, g, d).
        queries = query.view(num_prompts, num_samples, heads, -1, size).transpose(1, 2)
        of_own = queries.reshape(num_rows, -1, size)
        of_prompt = of_own.view(len(prompt_keys), -1, size)
        scale, softcap = form.scale(size), form.softcap
        scores_of_prompt = product(of_prompt, prompt_keys.transpose(1, 2), scale)
        scores_of_own = product(of_own, keys.transpose(1, 2), scale)
        scores = torch.cat([scores_of_prompt.view(num_rows, -1, num_prompt), scores_of_own], 2)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores.view(num_prompts, -1, scores.shape[2]).add_(bias)
        rest = None
        if form.sinks is not None:  # what the sinks leave to the keys
            sinks = form.sinks.to(scores.dtype).view(heads, 1, -1)
            rest = torch.sigmoid(scores.logsumexp(-1).view(*self._shape, -1) - sinks)
        torch.softmax(scores, -1, out=scores)
        if rest is not None:
            scores.mul_(rest.view(num_rows, -1, 1))
        by_prompt = scores.view(len(prompt_keys), -1, scores.shape[2])[:, :, :num_prompt]
        output = product(by_prompt, prompt_values).view(num_rows, -1, values.shape[2])
        torch.baddbmm(output, scores[:, :, num_prompt:], values, out=output)
        by_head = output.view(num_prompts, heads, num_samples, -1, values.shape[2])
        return by_head.transpose(1, 2).reshape(len(query), -1, values.shape[2])
