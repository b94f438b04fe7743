"""Eager loss, necessary FLOPs and bare matrix products of a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads import BETA
from benchmarks.step_cases import ModelShape
from benchmarks.step_worker import Clock, Job
from fastalign.batch.packed import Group

# Peak dense bfloat16 FLOPs per second by part of the GPU's name, from data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@torch.no_grad()
def eager_logprobs(model: Any, groups: Sequence[Group]) -> list[list[Tensor]]:
    """Return the log-probs of each response's tokens, computed one sequence at a time."""
    found = []
    for group in groups:
        responses = []
        for response in group.response_ids:
            ids = torch.tensor([*group.prompt_ids, *response], device=model.device)
            logits = model(ids[None]).logits[0, -len(response) - 1 : -1].float()
            targets = ids[-len(response) :, None]
            responses.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
        found.append(responses)
    return found


def eager_dpo(job: Job) -> float:
    """Return the DPO loss (arXiv 2305.18290, eq. 7)."""
    policy = eager_logprobs(_causal_model(job, job.policy), job.groups)
    reference = eager_logprobs(_causal_model(job, job.reference), job.groups)
    margins = []
    for ours, theirs in zip(policy, reference, strict=True):
        chosen, rejected = (a.sum() - b.sum() for a, b in zip(ours, theirs, strict=True))
        margins.append(chosen - rejected)
    return float(-torch.nn.functional.logsigmoid(BETA * torch.stack(margins)).mean())


def eager_sft(job: Job) -> float:
    """Return the mean cross-entropy of all responses' tokens."""
    logprobs = eager_logprobs(_causal_model(job, job.policy), job.groups)
    return float(-torch.cat([part for responses in logprobs for part in responses]).mean())


@torch.no_grad()
def eager_reward(job: Job) -> float:
    """Return the Bradley-Terry loss of the scores at each sequence's last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job.policy, dtype=torch.float32)
    model.to(job.device).eval()
    margins = []
    for group in job.groups:
        chosen, rejected = (
            model(torch.tensor([[*group.prompt_ids, *ids]], device=model.device)).logits[0, 0]
            for ids in group.response_ids
        )
        margins.append(chosen - rejected)
    return float(-torch.nn.functional.logsigmoid(torch.stack(margins)).mean())


def _causal_model(job: Job, folder: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(job.device).eval()


TRUTHS: dict[str, Callable[[Job], float]] = {
    "dpo-step": eager_dpo,
    "sft-step": eager_sft,
    "reward-step": eager_reward,
}


def head_rows(groups: Sequence[Group]) -> int:
    """Return the number of predicted tokens."""
    return sum(len(ids) for group in groups for ids in group.response_ids)


def useful_tokens(groups: Sequence[Group]) -> int:
    """Return the number of tokens of prompts, counted once, and of responses."""
    return sum(group.num_tokens for group in groups)


def useful_flops(shape: ModelShape, groups: Sequence[Group], *, head: bool) -> int:
    """Return the FLOPs of a forward and backward pass that no implementation can avoid.

    These are the products of every useful token with the blocks' weights and of every predicted
    token with a language-model head, and the attention of every token to those it may see.
    """
    blocks = useful_tokens(groups) * sum(rows * columns for rows, columns in shape.products())
    of_head = head_rows(groups) * shape.hidden_size * shape.vocab_size if head else 0
    seen = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        seen += prompt * (prompt + 1) // 2
        seen += sum(n * prompt + n * (n + 1) // 2 for n in map(len, group.response_ids))
    attention = 2 * seen * shape.num_heads * shape.head_dim * shape.num_layers
    return 3 * 2 * (blocks + of_head + attention)


def run_products(job: Job, clock: Clock, *, head: bool = True) -> None:
    """Run the bare products of the useful tokens, forward and backward, in place of a trainer."""
    dtype = getattr(torch, job.dtype)
    tokens, width = useful_tokens(job.groups), job.shape.hidden_size
    work = [(tokens, *product) for product in job.shape.products()]
    if head:
        work.append((head_rows(job.groups), width, job.shape.vocab_size))
    clock.first_loss = lambda: 0.0
    clock.watch()
    tensors = [
        tuple(
            torch.randn(size, dtype=dtype, device=job.device)
            for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        for rows, inputs, outputs in sorted(set(work))
    ]
    which = [sorted(set(work)).index(one) for one in work]
    while True:
        for index in which:
            value, weight, gradient = tensors[index]
            torch.mm(value, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), value)
        clock.end_turn()


def run_products_without_head(job: Job, clock: Clock) -> None:
    """Run the bare products of a reward model."""
    run_products(job, clock, head=False)
