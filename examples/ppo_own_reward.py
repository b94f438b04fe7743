# %% [markdown]
# # PPO with a reward of your own
#
# A reward is a function of the completions and of whatever columns of the rows it names. Here it
# reads the answers of GSM8K's word problems, and the policy is trained by GRPO.

# %%
import json
from itertools import islice

from small_model import small_model

import fastalign
from fastalign import samples
from fastalign.rewards import numeric_answer
from fastalign.rollouts import SamplingParams
from fastalign.trainers import Grpo, KLInLoss, OptimConfig, PPOConfig, PPOSettings, TrainConfig

# %%
model, tokenizer = small_model()
with (samples.folder("gsm8k") / "train.jsonl").open() as file:
    rows = [row for row in map(json.loads, islice(file, 200)) if len(row["prompt"]) < 250]

# %% [markdown]
# A model of random weights never solves a problem, so it is also paid for digits. Rewards are
# called with as many completions at once as a step has.


# %%
def digits(completions: list[str]) -> list[float]:
    """Return the share of each completion's characters that are digits."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


config = PPOConfig(
    ppo=PPOSettings(advantage=Grpo(), epochs=1),
    kl=KLInLoss(coefficient=0.01),
    sampling=SamplingParams(num_samples=8, max_new_tokens=12),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(max_steps=6, batch_size=8),
)
result = fastalign.train_ppo(
    config, model=model, tokenizer=tokenizer, train_data=rows, reward=[numeric_answer, digits]
)
for row in result.metrics:
    answers, share = (row[f"rewards/{name}/mean"] for name in ("numeric_answer", "digits"))
    print(f"step {row['step']}: right answers {answers:.3f}, digits {share:.3f}")
