# %% [markdown]
# # A fused loss in a training loop of your own
#
# `fused_linear_preference_loss` takes hidden states and the head's weight in place of logits: the
# (tokens, vocabulary) logits of a batch never exist. The rest of the loop is plain PyTorch.

# %%
import json
from itertools import islice

import torch
from small_model import small_model

from fastalign import fused_linear_preference_loss, samples
from fastalign.losses import formula, simpo

# %% [markdown]
# Pairs of a preferred and a worse continuation, as token ids. Ties are left out.

# %%
model, tokenizer = small_model()
with (samples.folder("pros_cons") / "pairs_train.jsonl").open() as file:
    rows = [row for row in map(json.loads, islice(file, 100)) if row["label"] != "tie"]


def tokens(row: dict[str, str], side: str) -> tuple[list[int], list[int]]:
    """Return a sequence's ids and its targets, -100 on the prompt."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row[f"response_{side}"], add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def batch_of(rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and targets of the sequences, chosen and rejected in turn, padded."""
    sides = [(row, side) for row in rows for side in (row["label"], "ab"[row["label"] == "a"])]
    found = [tokens(row, side) for row, side in sides]
    longest = max(len(ids) for ids, _ in found)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in found])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in found])
    targets = torch.tensor([t + [-100] * (longest - len(t)) for _, t in found])
    return ids, mask, targets


# %% [markdown]
# SimPO needs no reference model. The loss's backward holds the head's gradient already.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss_of_pairs = formula(simpo, beta=2.0, gamma=0.5)
losses = []
for step in range(20):
    ids, mask, targets = batch_of(rows[step % 4 * 8 : step % 4 * 8 + 8])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    # Position t predicts token t + 1, so the hidden states of the last position predict nothing.
    loss, metrics = fused_linear_preference_loss(
        hidden[:, :-1].flatten(0, 1),
        model.lm_head.weight,
        targets[:, 1:].flatten(),
        torch.arange(0, ids.numel() - len(ids) + 1, ids.shape[1] - 1),
        loss_of_pairs,
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
print({name: round(value.item(), 3) for name, value in metrics.items()})
