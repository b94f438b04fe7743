# %% [markdown]
# # DPO from objects in memory
#
# A model, a tokenizer and rows go in; a trained model comes out. What is not said has a default.

# %%
import json
from itertools import islice

import matplotlib.pyplot as plt
import torch
from small_model import small_model

import fastalign
from fastalign import samples
from fastalign.trainers import DPOConfig, OptimConfig, TrainConfig

# %% [markdown]
# Rows are dictionaries with TRL's columns: a list, a generator or a `datasets.Dataset` of them.

# %%
model, tokenizer = small_model()
rows = []
with (samples.folder("pros_cons") / "pairs_train.jsonl").open() as file:
    for row in map(json.loads, islice(file, 150)):
        if row["label"] != "tie":
            better, worse = ("a", "b") if row["label"] == "a" else ("b", "a")
            chosen, rejected = row[f"response_{better}"], row[f"response_{worse}"]
            rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
train_rows, held_out = rows[:80], rows[80:]

# %% [markdown]
# Settings are those of the command line: `OptimConfig(lr=1e-3)` is `--optim.lr 1e-3`.

# %%
config = DPOConfig(
    optim=OptimConfig(lr=1e-3),
    train=TrainConfig(max_steps=12, batch_size=16, eval_every=4),
)
result = fastalign.train_dpo(
    config, model=model, tokenizer=tokenizer, train_data=train_rows, eval_data=held_out
)
print(result.folder, "has checkpoints, metrics.jsonl and model/")

# %%
steps = [row["step"] for row in result.metrics]
held_out_loss = [(row["step"], row["eval_loss"]) for row in result.metrics if "eval_loss" in row]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(steps, [row["loss"] for row in result.metrics], label="training")
left.plot(*zip(*held_out_loss, strict=True), "o-", label="held out")
left.set(title="loss", xlabel="step")
left.legend()
right.plot(steps, [row["rewards/margins"] for row in result.metrics])
right.set(title="margin of the implicit rewards", xlabel="step")
plt.show()

# %% [markdown]
# The result's model is one of transformers. The model that was handed over is as it was.

# %%
prompt = tokenizer("The battery", return_tensors="pt")
torch.manual_seed(0)
answer = result.model.generate(**prompt, max_new_tokens=12, do_sample=True)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
