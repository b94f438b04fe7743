"""Time every implementation of shared-prefix attention, forward and backward, on one packed row.

Each is compared with SDPA in float32 first; one that differs is not timed.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.measure import device_name, measure
from fastalign.batch.packed import Group, PackedBatch, pack
from fastalign.models.attention.choice import ATTENTIONS, AttentionName, attention_reason
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.attention.segments import ScoreForm

HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128  # those of Llama 3 8B
PROMPT, RESPONSES = 512, (384, 128)  # tokens
AGREEMENT = 2e-2  # of the largest value; bfloat16 has 8 bits
NAMES = ("output", "query", "key", "value")


def make_batch(num_tokens: int) -> PackedBatch:
    """Return a packed row of about so many tokens: prompts with two responses each."""
    of_group = PROMPT + sum(RESPONSES)
    group = Group([5] * PROMPT, [[5] * length for length in RESPONSES])
    return pack([group] * max(num_tokens // of_group, 1))


def attention_flops(batch: PackedBatch) -> int:
    """Return the FLOPs of a forward and backward pass over every query and the keys it may see."""
    length = PROMPT * (PROMPT + 1) // 2
    length += sum(n * PROMPT + n * (n + 1) // 2 for n in RESPONSES)
    groups = batch.num_tokens // (PROMPT + sum(RESPONSES))
    return 7 * 2 * groups * length * HEADS * HEAD_SIZE  # 2 products forward, 5 backward


def attend(plan: AttentionPlan, name: AttentionName, leaves: list[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of its sum times a ramp."""
    for leaf in leaves:
        leaf.grad = None
    output = plan.attend(name, *leaves, ScoreForm())
    ramp = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device)
    (output * ramp).sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [output.detach(), *gradients]


def differences(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Return the largest difference of each value, relative to the value's largest."""
    return {
        name: float((ours.float() - true).abs().max() / true.abs().max())
        for name, ours, true in zip(NAMES, found, truth, strict=True)
    }


def main() -> None:
    """Check and time each implementation that can run."""
    parser = make_parser("attention", __doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, rows = arguments.device, Rows(arguments.json)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = make_batch(arguments.tokens).to(device)
    plan, flops = AttentionPlan(batch), attention_flops(batch)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(batch.num_tokens, heads, HEAD_SIZE, generator=generator).to(device, dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    truth = attend(plan, "sdpa", [leaf.float().detach().requires_grad_() for leaf in leaves])
    for name in ATTENTIONS:
        reason = attention_reason(name, torch.device(device), dtype)
        if reason is not None:
            rows.add({"attention": name, "unusable": reason})
            continue
        ours = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        differing = differences(attend(plan, name, ours), truth)
        row = {"attention": name, "tokens": batch.num_tokens, **differing}
        if not max(differing.values()) <= AGREEMENT:
            rows.add({**row, "not_timed": f"differs from float32 by more than {AGREEMENT}"})
            continue
        call = partial(attend, plan, name, ours)
        found = measure({name: call}, device, num_rounds=arguments.rounds)[name]
        rows.add(
            {
                **row,
                "milliseconds": found.milliseconds,
                "spread": found.spread,
                "peak_bytes": found.peak_bytes,
                "teraflops": flops / found.milliseconds / 1e9,
                "device": device_name(device),
            }
        )


if __name__ == "__main__":
    main()
