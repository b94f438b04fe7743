"""Gradients of one step, for the tests of the trainers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_policy
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import LOSSES
from fastalign.trainers.dpo import train as dpo
from tests.small_runs import dpo_config, prepared_pairs

PACKINGS = ["shared_prefix", "packed", "padded"]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def dpo_gradient(
    folder: Path, packing: str, tokens: int, **loss: Any
) -> tuple[float, dict[str, Tensor]]:
    config = dpo_config(folder, "unused")
    config = replace(config, loss=LOSSES[loss.pop("name", "dpo")](**loss))
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model = load_policy(folder / "llama", compute)
    tokenizer = load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    pairs = prepared_pairs(config, model, tokenizer, data, range(12), compute)
    total = dpo.dpo_gradient(model, config.loss, pairs, [3, 1, 4, 5, 9, 2, 6], compute)
    return total.loss, gradients(model)


def eager_dpo_gradient(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """DPO's step-0 gradient by plain transformers and torch on padded sequences."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    losses = []
    for index in [3, 1, 4, 5, 9, 2, 6]:
        row = rows[index]
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [
            tokenizer(row[side], add_special_tokens=False)["input_ids"] + [2]
            for side in ("chosen", "rejected")
        ]
        longest = max(len(side) for side in sides)
        ids = torch.tensor([prompt + side + [0] * (longest - len(side)) for side in sides])
        mask = torch.tensor(
            [[1] * (len(prompt) + len(s)) + [0] * (longest - len(s)) for s in sides]
        )
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        logprob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        of_response = mask[:, 1:].clone()
        of_response[:, : len(prompt) - 1] = 0
        chosen, rejected = (logprob * of_response).sum(-1)
        difference = chosen - rejected
        losses.append(-F.logsigmoid(0.1 * (difference - difference.detach())))
    torch.stack(losses).mean().backward()
    return gradients(model)
