"""Eager loss, necessary FLOPs and bare matrix products of a step."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.careful_eager import generate
from benchmarks.heads import BETA, multiply
from benchmarks.step_cases import ModelShape
from benchmarks.step_worker import Clock, Job
from fastalign.batch.packed import Group

FEW_PRODUCTS = 5  # of a kind, whose mean is counted for all
NUM_EAGER_SAMPLES = 64  # at least; their mean is compared with that of one iteration
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


def eager_nats(job: Job) -> tuple[float, float]:
    """Return a sampled response's mean surprisal in nats, and a relative tolerance of others.

    Other samples differ by chance: five standard errors of the difference of the two means.
    """
    assert job.ppo is not None
    torch.manual_seed(0)
    model = _causal_model(job, job.policy)
    num_samples = job.ppo.num_prompts * job.ppo.num_samples
    copies = -(-NUM_EAGER_SAMPLES // num_samples)
    groups = generate(model, job.groups * copies, job.ppo.new_tokens)
    logprobs = eager_logprobs(model, groups)
    nats = -torch.stack([part.sum() for responses in logprobs for part in responses])
    mean, error = nats.mean().item(), nats.std().item() * (1 / len(nats) + 1 / num_samples) ** 0.5
    return mean, 5 * error / mean


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


class Product(NamedTuple):
    """A linear layer's work: how often, and whether its two gradients follow."""

    rows: int
    inputs: int
    outputs: int
    backward: bool = True
    repeats: int = 1


def products_of_step(job: Job, *, head: bool = True, backward: bool = True) -> list[Product]:
    """Return the bare products of one pass over the useful tokens."""
    shape, tokens = job.shape, useful_tokens(job.groups)
    work = [Product(tokens, *each, backward) for each in shape.products()]
    if head:
        predicted = head_rows(job.groups)
        work.append(Product(predicted, shape.hidden_size, shape.vocab_size, backward))
    return work


def products_of_iteration(job: Job) -> list[Product]:
    """Return those of a PPO iteration: sampling, log-probs (values, scores), and the updates.

    A prompt is computed once for its samples in each pass. Sampling is one pass over the prompts,
    then one token of all samples at a time. Log-probs before the updates are the reference's and
    the policy's.
    """
    case, shape = job.ppo, job.shape
    assert case is not None
    prompts = sum(len(group.prompt_ids) for group in job.groups)
    samples = case.num_prompts * case.num_samples
    head = (shape.hidden_size, shape.vocab_size)
    work = [Product(prompts, *each, False) for each in shape.products()]
    work += [Product(samples, *each, False, case.new_tokens) for each in (*shape.products(), head)]
    work += 2 * products_of_step(job, backward=False)
    updates = products_of_step(job)
    if case.has_value:
        work += 2 * products_of_step(job, head=False, backward=False)
        updates += products_of_step(job, head=False)
    return work + case.epochs * updates


def run_products(work: Sequence[Product], job: Job, clock: Clock) -> None:
    """Run bare products in place of a trainer.

    On a CPU a product that the work has many times is run a few times, and its mean is counted.
    """
    times = Counter({each: 0 for each in work})
    for each in work:
        times[each] += each.repeats
    dtype = getattr(torch, job.dtype)
    clock.first_loss = lambda: 0.0
    clock.watch()
    shapes = {each[:3] for each in work}
    tensors = {
        (rows, inputs, outputs): tuple(
            torch.randn(size, dtype=dtype, device=job.device)
            for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        for rows, inputs, outputs in sorted(shapes)
    }
    few = FEW_PRODUCTS if job.device == "cpu" else max(times.values())
    while True:
        seconds = 0.0
        for each, number in times.items():
            value, weight, gradient = tensors[each[:3]]
            start = time.perf_counter()
            for _ in range(min(number, few)):
                multiply(value, weight.t())
                if each.backward:
                    multiply(gradient, weight)
                    multiply(gradient.t(), value)
            seconds += (time.perf_counter() - start) * max(1.0, number / few)
        clock.end_turn(seconds if job.device == "cpu" else None)


def run_step_products(job: Job, clock: Clock) -> None:
    """Run those of a step of a causal model."""
    run_products(products_of_step(job), job, clock)


def run_step_products_without_head(job: Job, clock: Clock) -> None:
    """Run those of a step of a reward model."""
    run_products(products_of_step(job, head=False), job, clock)


def run_iteration_products(job: Job, clock: Clock) -> None:
    """Run those of a PPO iteration."""
    run_products(products_of_iteration(job), job, clock)
