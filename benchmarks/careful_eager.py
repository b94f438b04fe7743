"""A careful eager training loop: what a good engineer writes with PyTorch and transformers alone.

Rows are padded to the longest and attend by SDPA. The head runs on the positions that predict a
response's tokens, and on no other. DPO's reference log-probs are known before the first step. AdamW
is fused, and bfloat16 is autocast over float32 weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.heads import BETA
from benchmarks.step_worker import Clock, Job
from fastalign.batch.packed import Group

LEARNING_RATE, MAX_NORM = 1e-6, 1.0


class Rows(NamedTuple):
    """One padded row for each response: R rows, L the longest, N response tokens."""

    ids: Tensor  # (R, L)
    mask: Tensor  # (R, L), 1 of real tokens
    predicts: Tensor  # (N,) places among the R * L that predict a response token
    targets: Tensor  # (N,)
    lengths: list[int]  # R, tokens of each response
    last: Tensor  # (R,) place of each row's last token among the R * L


def pad_rows(groups: Sequence[Group], device: str) -> Rows:
    """Pad every prompt with its response on the right."""
    pairs = [(group.prompt_ids, ids) for group in groups for ids in group.response_ids]
    longest = max(len(prompt) + len(ids) for prompt, ids in pairs)
    ids, mask = (torch.zeros(len(pairs), longest, dtype=torch.long) for _ in range(2))
    predicts, last = [], []
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        first = row * longest + len(prompt) - 1
        predicts.append(torch.arange(first, first + len(response)))
        last.append(row * longest + end - 1)
    where = torch.cat(predicts)
    tensors = (ids, mask, where, ids.flatten()[where + 1])
    lengths = [len(response) for _, response in pairs]
    return Rows(*(each.to(device) for each in tensors), lengths, torch.tensor(last, device=device))


def hidden_states(model: Any, rows: Rows) -> Tensor:
    """Return the last hidden states, (R * L, D)."""
    output = model.base_model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)
    return hidden


def token_logprobs(model: Any, rows: Rows) -> Tensor:
    """Return the log-prob of every response token, (N,)."""
    logits = model.lm_head(hidden_states(model, rows)[rows.predicts])
    return -F.cross_entropy(logits.float(), rows.targets, reduction="none")


def load_causal(folder: object, job: Job) -> Any:
    """Load a causal model in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(job.device)


def load_reward(folder: object, job: Job) -> Any:
    """Load a reward model in float32."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.to(job.device)


def autocast(job: Job) -> torch.autocast:
    """Return the products' dtype as a context."""
    return torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bfloat16")


def make_step(*models: torch.nn.Module) -> Callable[[Tensor], None]:
    """Return the rest of a step from its loss on: backward, clipping, AdamW."""
    parameters = [weight for model in models for weight in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for model in models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(model: Any, loss_of: Callable[[], Tensor], job: Job, clock: Clock) -> None:
    """Take steps on the same rows, until the clock ends them."""
    losses: list[float] = []
    clock.first_loss = lambda: losses[0]
    step = make_step(model)
    while True:
        with autocast(job):
            loss = loss_of()
        losses.append(loss.item())
        step(loss)


def dpo(job: Job, clock: Clock) -> None:
    """Train by DPO."""
    clock.watch()
    model, reference = load_causal(job.policy, job), load_causal(job.reference, job)
    rows = pad_rows(job.groups, job.device)

    def sums(of: Any) -> Tensor:
        return torch.stack([part.sum() for part in token_logprobs(of, rows).split(rows.lengths)])

    with torch.no_grad(), autocast(job):
        known = sums(reference)
    del reference

    def loss_of() -> Tensor:
        ratio = sums(model) - known
        return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()

    train(model, loss_of, job, clock)


def sft(job: Job, clock: Clock) -> None:
    """Train by cross-entropy."""
    clock.watch()
    model, rows = load_causal(job.policy, job), pad_rows(job.groups, job.device)
    train(model, lambda: -token_logprobs(model, rows).mean(), job, clock)


def reward(job: Job, clock: Clock) -> None:
    """Train a reward model by the Bradley-Terry loss."""
    clock.watch()
    model, rows = load_reward(job.policy, job), pad_rows(job.groups, job.device)

    def loss_of() -> Tensor:
        score = model.score(hidden_states(model, rows)[rows.last])[:, 0].float()
        return -F.logsigmoid(score[0::2] - score[1::2]).mean()

    train(model, loss_of, job, clock)


def generate(model: Any, groups: Sequence[Group], num_new: int) -> list[Group]:
    """Sample as many answers to each prompt as it has responses; an end token is the last."""
    from benchmarks.step_cases import EOS, PAD

    prompts = [group.prompt_ids for group in groups for _ in group.response_ids]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(each)) + list(each) for each in prompts])
    real = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    options = {"do_sample": True, "top_k": 0, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.no_grad():
        output = model.generate(
            ids.to(model.device),
            attention_mask=real.to(model.device),
            max_new_tokens=num_new,
            **options,
        )
    answers = []
    for new in output[:, longest:].tolist():
        end = new.index(EOS) + 1 if EOS in new else num_new
        answers.append(new[:end])
    drawn = iter(answers)
    return [Group(g.prompt_ids, [next(drawn) for _ in g.response_ids]) for g in groups]
