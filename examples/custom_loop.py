# %% [markdown]
# # A loop of your own, with a loss of your own
#
# `fastalign.dpo_run` opens a run: data, reference log-probs, optimiser, checkpoints, metrics. The
# loop is yours, and so is the loss: a function of a batch's sequence log-probs.

# %%
import json
from itertools import islice

import torch
from small_model import small_model

import fastalign
from fastalign import samples
from fastalign.losses import PairLogprobs
from fastalign.trainers import DPOConfig, OptimConfig, PreferenceDataConfig, TrainConfig

# %%
model, tokenizer = small_model()
with (samples.folder("pros_cons") / "pairs_train.jsonl").open() as file:
    rows = list(map(json.loads, islice(file, 150)))


# %%
def cautious(pairs: PairLogprobs) -> torch.Tensor:
    """DPO's loss, and a penalty where the chosen answer becomes less likely than it was."""
    chosen, rejected, old_chosen, old_rejected = pairs.logprobs()
    margin = (chosen - old_chosen) - (rejected - old_rejected)
    return -torch.nn.functional.logsigmoid(0.1 * margin) + 0.05 * torch.relu(old_chosen - chosen)


# %% [markdown]
# Each step is logged, and saved if a checkpoint is due, when the next one is asked for. The run
# ends behind the loop; `run.stop` ends it earlier.

# %%
config = DPOConfig(
    data=PreferenceDataConfig(ties="drop"),
    optim=OptimConfig(lr=1e-3),
    train=TrainConfig(max_steps=12, batch_size=16, eval_every=4),
)
with fastalign.dpo_run(
    config, model=model, tokenizer=tokenizer, train_data=rows[:100], eval_data=rows[100:]
) as run:
    for step in run.steps():
        total = run.gradient(step.indices, cautious)
        step.finish(run.optimise(total))
        if step.evaluates:
            found = run.evaluate(cautious)
            step.log(found)
            print(f"step {step.number}: held-out loss {found['eval_loss']:.3f}")
        if step.metrics["rewards/margins"] > 2:
            run.stop("the margin is wide enough")
print(f"{run.result.step} steps, finished: {run.result.finished}, in {run.result.folder}")
