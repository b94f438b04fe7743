"""The plan of one row's attention: made on the host, shared by all layers."""

from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.models.attention.blocks import Blocks
from fastalign.models.attention.choice import AttentionName
from fastalign.models.attention.flex import Flex
from fastalign.models.attention.segments import ScoreForm, Segments, row_segments
from fastalign.models.attention.varlen import KERNELS, Varlen


class RowPlan:
    """The attention of a row of segments.

    Args:
        segments: the row's segments.
        device: device of its tokens.

    Attributes:
        read_index: (K,) int64, tokens whose last hidden states may be read; None: all.
        num_attended: number of calls of `attend`.
        needs: what they needed beside the usual: softcap, sinks, value_width.
    """

    read_index: Tensor | None = None

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self._segments, self._device = segments, device
        self._prepared: dict[type, Any] = {}
        self.num_attended = 0
        self.needs: set[str] = set()

    def prepare(self, name: AttentionName) -> Any:
        """Do the host's work for an implementation now, rather than at the first `attend`."""
        kind: type = {"sdpa": Blocks, "flex": Flex}.get(name, Varlen)
        if kind not in self._prepared:
            self._prepared[kind] = kind(self._segments, self._device)
        return self._prepared[kind]

    def attend(
        self,
        name: AttentionName,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, e)
        form: ScoreForm,
        layer: int | None = None,  # for plans that keep keys and values
    ) -> Tensor:  # (T, H, e)
        """Compute the attention of the row."""
        self.num_attended += 1
        if form.softcap is not None:
            self.needs.add("softcap")
        if form.sinks is not None:
            self.needs.add("sinks")
        if value.shape[-1] != query.shape[-1]:
            self.needs.add("value_width")
        kernel = (KERNELS[name],) if name in KERNELS else ()
        output: Tensor = self.prepare(name).attend(*kernel, query, key, value, form)
        return output


class AttentionPlan(RowPlan):
    """The attention of a packed batch, of whose prompts the last hidden state alone is read.

    Args:
        batch: the batch.
        is_trial: True if no layer need use the plan, as where that is to be found out.
    """

    def __init__(self, batch: PackedBatch, *, is_trial: bool = False) -> None:
        super().__init__(row_segments(batch.layout), batch.input_ids.device)
        self.is_trial = is_trial
        read = torch.ones(batch.num_tokens, dtype=torch.bool)
        for first, stop in batch.layout.prompt_bounds:
            read[first : stop - 1] = False
        self.read_index = torch.nonzero(read)[:, 0].to(self._device, non_blocking=True)
