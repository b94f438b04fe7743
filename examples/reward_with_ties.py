# %% [markdown]
# # A reward model that knows ties
#
# People often find two answers equally good. Rao and Kupper's model gives ties a probability of
# their own, whose frequency `nu` is learned with the rewards.

# %%
import json
from itertools import islice

import torch
from small_model import small_model

import fastalign
from fastalign import samples
from fastalign.trainers import REWARD_LOSSES, OptimConfig, RewardConfig, TrainConfig

# %% [markdown]
# Rows have `response_a`, `response_b` and a label: `a`, `b` or `tie`.

# %%
model, tokenizer = small_model()
with (samples.folder("pros_cons") / "pairs_train.jsonl").open() as file:
    rows = list(map(json.loads, islice(file, 260)))
print(sum(row["label"] == "tie" for row in rows), "of", len(rows), "pairs are ties")

# %%
config = RewardConfig(
    loss=REWARD_LOSSES["rao_kupper"](nu_lr=0.05),
    optim=OptimConfig(lr=2e-3),
    train=TrainConfig(max_steps=16, batch_size=32),
)
result = fastalign.train_reward(
    config, model=model, tokenizer=tokenizer, train_data=rows[:200], eval_data=rows[200:]
)
print({name: result.metrics[-1][name] for name in ("loss", "accuracy", "nu")})
measures = json.loads((result.folder / "eval" / "eval.json").read_text())
print(
    f"held-out accuracy {measures['accuracy']:.2f}, the longer one wins "
    f"{measures['longer_wins_accuracy']:.2f}"
)

# %% [markdown]
# The reward of an answer is the score at its end, which is an EOS token.

# %%
for text in ("Battery life is excellent, easy to use", "Slow, and the screen is too dim"):
    ids = result.tokenizer(text + result.tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        print(f"{result.model(input_ids=ids).logits.item():6.2f}  {text}")
