"""Each implementation of shared-prefix attention on a GPU, beside float64 SDPA on the CPU."""

import os
import random

import pytest
import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch, pack
from tests.tolerance import assert_no_worse

pytest.importorskip("transformers")
from fastalign.models.attention.choice import ATTENTIONS, AttentionName, attention_reason
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.attention.segments import ScoreForm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
# heads, key heads, head size, and what becomes of the scores
FORMS = {
    "plain": (4, 4, 64, ScoreForm()),
    "grouped": (8, 2, 128, ScoreForm()),
    "windowed": (4, 2, 64, ScoreForm(window=37)),
    "capped": (4, 2, 256, ScoreForm(softcap=20.0)),
    "windowed and capped": (4, 4, 64, ScoreForm(window=100, softcap=20.0)),
}


def some_batch(longest: int = 300) -> PackedBatch:
    rng = random.Random(0)

    def tokens() -> list[int]:
        return [5] * rng.randint(1, longest)

    return pack([Group(tokens(), [tokens() for _ in range(n)]) for n in (2, 1, 5, 2)])


def attended(
    name: AttentionName, batch: PackedBatch, rows: list[Tensor], form: ScoreForm
) -> dict[str, Tensor]:
    """Output and gradients, on the CPU."""
    leaves = [row.detach().requires_grad_() for row in rows]
    plan = AttentionPlan(batch.to(rows[0].device))
    output = plan.attend(name, *leaves, form)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    output.backward(weight.to(output))
    found = [output.detach(), *(leaf.grad for leaf in leaves)]
    names = ("output", "query", "key", "value")
    return {n: value.cpu() for n, value in zip(names, found, strict=True) if value is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: AttentionName, kind: str, dtype: torch.dtype) -> None:
    heads, key_heads, size, form = FORMS[kind]
    reason = attention_reason(name, torch.device("cuda"), dtype)
    if reason is not None or (name == "varlen" and form.softcap is not None):
        pytest.skip(reason or "it has no softcap")
    batch = some_batch()
    torch.manual_seed(0)
    rows = [torch.randn(batch.num_tokens, n, size).to(dtype) for n in (heads, *[key_heads] * 2)]
    truth = attended("sdpa", batch, [row.double() for row in rows], form)
    eager = attended("sdpa", batch, rows, form)
    found = attended(name, batch, [row.cuda() for row in rows], form)
    again = attended(name, batch, [row.cuda() for row in rows], form)
    for which, true in truth.items():
        assert_no_worse(which, found[which], eager[which], true, dtype=dtype, length=600, scale=4.0)
        if name == "flash_attn":  # the others promise no order of their sums
            assert torch.equal(found[which], again[which]), f"{which}: not repeatable"


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_the_gpu_is_not_waited_for(name: AttentionName) -> None:
    reason = attention_reason(name, torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    batch = some_batch().to("cuda")
    rows = [torch.randn(batch.num_tokens, 4, 64, device="cuda").bfloat16() for _ in range(3)]
    plan = AttentionPlan(batch)
    plan.attend(name, *rows, ScoreForm())
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.attend(name, *rows, ScoreForm())
    finally:
        torch.cuda.set_sync_debug_mode("default")
