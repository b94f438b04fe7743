"""GRPO on word problems, each sample scored by its row's answer: gsm8k.yaml in Python.

python scripts/recipes/gsm8k.py MODEL RUN_FOLDER
"""

import sys

from fastalign.rollouts import SamplingParams
from fastalign.runs.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastalign.trainers import (
    Grpo,
    KLInLoss,
    PPOConfig,
    PPOSettings,
    PromptDataConfig,
    RewardSourceConfig,
    train_ppo,
)

SAMPLE = "fastalign/samples/gsm8k"


def gsm8k(model: str, folder: str) -> PPOConfig:
    """Return the recipe's settings for a model and the folder of the run."""
    return PPOConfig(
        model=ModelConfig(path=model),
        data=PromptDataConfig(train=f"{SAMPLE}/train.jsonl", eval=f"{SAMPLE}/eval.jsonl"),
        reward=RewardSourceConfig(("fastalign.rewards:numeric_answer",)),
        run=RunConfig(dir=folder),
        sampling=SamplingParams(num_samples=8, max_new_tokens=256),
        ppo=PPOSettings(advantage=Grpo(), epochs=1),
        kl=KLInLoss(coefficient=0.001),
        optim=OptimConfig(lr=1e-6, warmup_steps=10, eps=1e-5),
        train=TrainConfig(max_steps=200, batch_size=32, eval_every=20, save_every=20),
    )


if __name__ == "__main__":
    train_ppo(gsm8k(*sys.argv[1:]))
