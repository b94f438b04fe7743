"""Cases of a vocabulary shared by ranks, each run by every rank and by one process alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign import (
    VocabularyShard,
    fused_linear_loss,
    fused_linear_ppo_loss,
    linear_logprob,
    sequence_logprob,
)
from fastalign.ops import TokenChunk
from tests.fused import fused_cases
from tests.ops.head import test_lora_head
from tests.ops.head.fused_linear_loss import fused_linear_loss_cases as loss_cases
from tests.ops.head.linear_logprob import linear_logprob_cases as logprob_cases
from tests.ops.head.linear_logprob.linear_logprob_cases import KERNELS, ROWS, TRANSFORMS

# The rows of each rank; rank 2 has no part in a group of two.
SPLITS: dict[str, list[tuple[int, int]]] = {
    "two": [(0, 19), (19, 37)],
    "two_uneven": [(5, 37), (0, 5)],
    "three": [(0, 13), (13, 26), (26, 37)],
    "three_empty": [(0, 20), (20, 20), (20, 37)],
}
EVEN = ("two", "three")
SHARDED = "wbB"  # leaves of which each rank has its own rows
BUDGETS = (800, 2_000, None)  # a row or two at a time in float64; some rows kept; all kept
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call and its backward."""

    kind: str
    split: str
    dtype: torch.dtype = torch.float64
    trained: str = "hwb"
    detail: str = ""  # of linear_logprob: what is differentiated; of fused_linear_loss: the groups
    banned: bool = False  # the first rank's tokens have a bias of -inf
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [self.kind, self.split, str(self.dtype)[6:], self.trained, self.detail]
        told.append("banned" if self.banned else "")
        for name, value in self.options.items():
            told.append(f"{name}={'rows' if isinstance(value, Tensor) else value}")
        return "-".join(part for part in told if part)


BOTH = (("logprob", "logprob+entropy"), ("loss", "uneven"))


def cases_of(split: str, details: Iterable[tuple[str, str]] = BOTH, **rest: Any) -> list[Case]:
    return [Case(kind, split, detail=detail, **rest) for kind, detail in details]


def made_cases() -> list[Case]:
    """Every split with every kernel, then some splits with everything else."""
    cases = []
    for split in SPLITS:
        for backend, dtype in KERNELS:
            if backend == "triton" and split != "three_empty":
                continue  # interpreted, it is slow
            options = {**TRANSFORMS["everything"], "backend": backend, "max_buffer_bytes": 2_000}
            cases += cases_of(split, dtype=dtype, options=options)
    every = (*BOTH, ("logprob", "logprob"), ("entropy_loss", "uneven"))
    groups = [(kind, name) for kind in ("loss", "entropy_loss") for name in ("rows", "even", "one")]
    drop_ins = [(kind, "") for kind in ("sft", "preference", "dpo", "ppo", "sequence_logprob")]
    for budget in BUDGETS:
        options = {"max_buffer_bytes": budget, "softcap": 2.0}
        for trained in ("", "h", "w", "b", "hw"):
            cases += cases_of("three_empty", every, trained=trained, options=options)
        cases += cases_of("two_uneven", groups, options=options)
        cases += cases_of("three", drop_ins, options=options)
        low = {"max_buffer_bytes": budget, "compute_dtype": torch.bfloat16}
        cases += cases_of("three", dtype=torch.float32, trained="hw", options=low)
        adapted = [("lora", function) for function in ("logprob", "entropy", "fused_linear_loss")]
        for trained in ("hAB", "hwbAB", "B"):
            cases += cases_of("three_empty", adapted, trained=trained, options=options)
    for transform in TRANSFORMS.values():
        cases += cases_of("three", options=transform)
    for trained in ("hwb", "h"):
        cases += cases_of("two", trained=trained, banned=True)
    return cases


CASES = {str(case): case for case in made_cases()}


def targets_of(case: Case, targets: Tensor) -> Tensor:
    """Without those that the case bans."""
    return torch.where((targets >= 0) & (targets < 19), 36, targets) if case.banned else targets


def leaves_of(case: Case, made: list[Tensor], shard: VocabularyShard | None) -> list[Tensor]:
    """Hidden, and the weight and bias or this shard of them; the trained ones need gradients."""
    hidden, weight, bias = (value.detach() for value in made)
    if case.banned:
        bias[:19] = -torch.inf
    if shard is not None:
        weight, bias = weight[shard.start : shard.stop], bias[shard.start : shard.stop]
    return [
        value.clone().requires_grad_(name in case.trained)
        for name, value in zip("hwb", (hidden, weight, bias), strict=True)
    ]


def run(case: Case, shard: VocabularyShard | None, **overridden: Any) -> Results:
    """The results and gradients of one call; with a shard, this rank's."""
    options = {**case.options, "vocabulary_shard": shard, **overridden}
    if case.kind == "logprob" and case.trained:
        values = leaves_of(case, logprob_cases.leaves(case.dtype), shard)
        targets = targets_of(case, logprob_cases.some_targets())
        found = logprob_cases.outputs(values, targets, case.detail, **options)
        return dict(zip(["logprob", "entropy", *case.trained], found, strict=True))
    if case.kind in ("logprob", "loss", "entropy_loss"):
        return _run_loss(case, options)
    if case.kind == "lora":
        return _run_lora(case, options)
    return _run_drop_in(case, options)


def _run_loss(case: Case, options: dict[str, Any]) -> Results:
    values = leaves_of(case, loss_cases.leaves(case.dtype), options["vocabulary_shard"])
    targets, bounds = (
        targets_of(case, loss_cases.some_targets()),
        loss_cases.GROUPS.get(case.detail),
    )
    if not case.trained:
        return _without_gradients(case, values, targets, options)
    if case.kind == "loss":
        return loss_cases.outputs(values, targets, bounds, **options)
    inner = loss_cases.group_loss(bounds, ROWS)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = inner(chunk)
        return loss - 0.3 * chunk.entropy.square().sum(), metrics

    hidden, weight, bias = values
    loss, metrics = fused_linear_loss(
        hidden, weight, targets, bounds, loss_fn, bias=bias, **options
    )
    return {"loss": loss.detach(), **metrics, **_gradients(case, loss, values)}


def _without_gradients(
    case: Case, values: list[Tensor], targets: Tensor, options: dict[str, Any]
) -> Results:
    hidden, weight, bias = values
    if case.kind == "logprob":
        found = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, **options)
        assert not any(value.requires_grad for value in found)
        return dict(zip(("logprob", "entropy"), found, strict=True))
    bounds = loss_cases.GROUPS[case.detail]
    loss_fn = loss_cases.group_loss(bounds, ROWS)
    loss, metrics = fused_linear_loss(
        hidden, weight, targets, bounds, loss_fn, bias=bias, **options
    )
    return {"loss": loss, **metrics}


def _run_lora(case: Case, options: dict[str, Any]) -> Results:
    values, shard = test_lora_head.operands(case.dtype, case.trained), options["vocabulary_shard"]
    if shard is not None:
        for name in SHARDED:
            here = values[name].detach()[shard.start : shard.stop].clone()
            values[name] = here.requires_grad_(name in case.trained)
    found = test_lora_head.read(values, case.detail, merged=False, **options)
    names = [name for name in values if name in case.trained]
    return dict(zip(("first", "second", *names), found, strict=True))


def _run_drop_in(case: Case, options: dict[str, Any]) -> Results:
    made = list(fused_cases.leaves(case.dtype))
    values = leaves_of(case, made, options["vocabulary_shard"])
    hidden, weight, bias = values
    targets, metrics = fused_cases.some_targets(), {}
    if case.kind == "ppo":
        rows = torch.linspace(-1.0, 2.0, 2 * fused_cases.NUM_ROWS, dtype=case.dtype).chunk(2)
        loss, metrics = fused_linear_ppo_loss(
            hidden,
            weight,
            targets,
            rows[0] - 4,
            rows[1],
            entropy_coefficient=0.3,
            bias=bias,
            **options,
        )
    elif case.kind == "sequence_logprob":
        sums = sequence_logprob(hidden, weight, targets, fused_cases.BOUNDS, bias=bias, **options)
        loss = (sums * torch.linspace(-1.0, 2.0, 6, dtype=case.dtype)).sum()
        metrics = {"sums": sums.detach()}
    else:
        call = getattr(fused_cases, f"fused_{case.kind}")
        loss, metrics = call(hidden, weight, bias, targets, **options)
    return {"loss": loss.detach(), **metrics, **_gradients(case, loss, values)}


def _gradients(case: Case, loss: Tensor, values: list[Tensor]) -> Results:
    trained = [value for value in values if value.requires_grad]
    return dict(zip(case.trained, torch.autograd.grad(loss, trained), strict=True))
