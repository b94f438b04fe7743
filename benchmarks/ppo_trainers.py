"""The trainers whose PPO iterations are compared: sampling, scores, log-probs, all updates.

All sample at temperature 1, up to the same number of new tokens, and take the same number of
optimiser steps of all samples. With GAE a reward model scores, and the value model begins as it;
otherwise `reward_of` scores. Two of ours are other problems of the same size: values from the
policy's own layers, and all models as adapters on one frozen base.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import careful_eager
from benchmarks.careful_eager import Rows, autocast, hidden_states, pad_rows, token_logprobs
from benchmarks.step_cases import MAX_LENGTH, PAD, make_tokenizer, word
from benchmarks.step_worker import Clock, Job, Trainer

KL, LAMBDA, CLIP, VALUE = 0.05, 0.95, 0.2, 0.1
RANK = 16  # of the adapters on one base
REWARD = f"{__name__}:reward_of"


def reward_of(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the share of words with an even number in each completion."""
    found = []
    for text in completions:
        words = text.split()
        found.append(sum(w[-1:] in "02468" for w in words) / max(len(words), 1))
    return found


def reward_adapter(job: Job) -> Path:
    """Return the folder of the reward model's adapter on the policy."""
    return job.reference.with_name("reward-adapter")


def write_reward_adapter(job: Job) -> None:
    """Write a reward model as an adapter on the policy, under a head drawn at random."""
    from fastalign.models.load import load_reward_model
    from fastalign.models.lora import add_adapter
    from fastalign.models.lora_files import save_adapter

    model = load_reward_model(job.policy)
    add_adapter(model, rank=RANK, alpha=2.0 * RANK, targets=("all-linear",))
    model.config.pad_token_id = PAD
    save_adapter(model, reward_adapter(job))
    make_tokenizer(job.shape.vocab_size).save_pretrained(reward_adapter(job))


def fastalign_ppo(
    job: Job, clock: Clock, *, share_policy: bool = False, one_base: bool = False
) -> None:
    """Run `train_ppo`, with values of the policy's own layers or with adapters on one base."""
    from benchmarks.step_trainers import settings
    from fastalign.rollouts import SamplingParams
    from fastalign.runs.config import LoraConfig
    from fastalign.trainers import PPOConfig, ValueConfig, train_ppo
    from fastalign.trainers.ppo.advantages import ADVANTAGES
    from fastalign.trainers.ppo.config import KLInLoss, KLInReward, PPOSettings
    from fastalign.trainers.sampling.config import PromptDataConfig, RewardSourceConfig

    case = job.ppo
    assert case is not None
    clock.first_loss = lambda: _logged(job)["objective/entropy"]
    clock.updates_per_turn = case.epochs
    clock.watch()
    source = str(job.reference) if case.has_value else REWARD
    kl = KLInLoss(KL) if case.advantage == "grpo" else KLInReward(KL)
    shared = settings(job)
    if one_base:
        source = str(reward_adapter(job))
        lora = LoraConfig(rank=RANK, alpha=2.0 * RANK)
        shared["model"] = replace(shared["model"], lora=lora)
    advantage = ADVANTAGES[case.advantage]()
    train_ppo(
        PPOConfig(
            data=PromptDataConfig(str(job.rows), max_length=MAX_LENGTH),
            reward=RewardSourceConfig((source,)),
            ppo=PPOSettings(advantage=advantage, epochs=case.epochs, one_base=one_base),
            value=ValueConfig(share_policy=share_policy),
            kl=kl,
            sampling=SamplingParams(case.new_tokens, num_samples=case.num_samples),
            **shared,
        )
    )


def _logged(job: Job) -> dict[str, float]:
    first, *_ = (job.scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, float] = json.loads(first)
    return found


def trl_gae(job: Job, clock: Clock) -> None:
    """Run the PPOTrainer of the TRL in the job's packages."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    case = job.ppo
    assert case is not None
    clock.updates_per_turn = case.epochs
    clock.watch()
    tokenizer = AutoTokenizer.from_pretrained(job.policy, padding_side="left")
    prompts = [{"input_ids": list(group.prompt_ids)} for group in job.groups]
    options = _trl_options(job) | {"num_ppo_epochs": case.epochs, "kl_coef": KL}
    trainer = PPOTrainer(
        args=PPOConfig(
            response_length=case.new_tokens,
            temperature=1.0,
            stop_token="eos",
            total_episodes=case.num_prompts * job.num_steps,
            num_sample_generations=0,
            **options,
        ),
        processing_class=tokenizer,
        model=careful_eager.load_causal(job.policy, job),
        ref_model=careful_eager.load_causal(job.policy, job),
        reward_model=careful_eager.load_reward(job.reference, job),
        value_model=careful_eager.load_reward(job.reference, job),
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts),
    )
    clock.first_loss = lambda: float(trainer.state.log_history[0]["objective/entropy"])
    trainer.train()


def trl_without_value(job: Job, clock: Clock) -> None:
    """Run TRL's RLOOTrainer or GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    case = job.ppo
    assert case is not None
    clock.updates_per_turn = case.epochs
    clock.watch()
    kinds = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    make_config, make_trainer = kinds[case.advantage]
    prompts = [
        json.loads(line) for line in job.rows.read_text(encoding="utf-8").splitlines() if line
    ]
    options = _trl_options(job) | {
        "num_iterations": case.epochs,
        "num_generations": case.num_samples,
        "max_completion_length": case.new_tokens,
        "max_steps": job.num_steps * case.epochs,
        "beta": KL,
    }
    trainer = make_trainer(
        model=str(job.policy),
        reward_funcs=[reward_of],
        args=make_config(
            temperature=1.0, model_init_kwargs={"dtype": "float32"}, logging_steps=1, **options
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(job.policy, padding_side="left"),
    )

    def nats() -> float:
        first = trainer.state.log_history[0]
        return float(first["entropy"]) * float(first["completions/mean_length"])

    clock.first_loss = nats
    trainer.train()


def _trl_options(job: Job) -> dict[str, Any]:
    case = job.ppo
    assert case is not None
    return {
        "output_dir": str(job.scratch / "run"),
        "per_device_train_batch_size": case.num_prompts * case.num_samples,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
    }


def careful_ppo(job: Job, clock: Clock) -> None:
    """Run a loop in plain PyTorch that does the same work."""
    case = job.ppo
    assert case is not None
    nats: list[float] = []
    clock.first_loss = lambda: nats[0]
    clock.updates_per_turn = case.epochs
    clock.watch()
    policy, reference = (careful_eager.load_causal(job.policy, job) for _ in range(2))
    value = scorer = None
    if case.has_value:
        value, scorer = (careful_eager.load_reward(job.reference, job) for _ in range(2))
    step = careful_eager.make_step(policy, *([] if value is None else [value]))
    while True:
        with autocast(job), torch.no_grad():
            groups = careful_eager.generate(policy, job.groups, case.new_tokens)
            rows = pad_rows(groups, job.device)
            old, known = token_logprobs(policy, rows), token_logprobs(reference, rows)
            score = _scores(scorer, groups, rows, old)
            before = None if value is None else _values(value, rows)
            in_reward = 0.0 if case.advantage == "grpo" else KL
            reward = _token_rewards(score, in_reward * (old - known), rows)
            advantage, returns = _advantages(reward, before, rows, case.num_samples)
        nats.append(float(-old.sum() / len(rows.lengths)))
        for _ in range(case.epochs):
            with autocast(job):
                new = token_logprobs(policy, rows)
                ratio = (new - old).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                if case.advantage == "grpo":
                    loss = loss + KL * ((known - new).exp() - 1 - (known - new)).mean()
                if value is not None:
                    assert before is not None
                    now = _values(value, rows)
                    near = before + (now - before).clamp(-CLIP, CLIP)
                    errors = torch.maximum((now - returns).square(), (near - returns).square())
                    loss = loss + VALUE * errors.mean() / 2
            step(loss)


def _values(value: Any, rows: Rows) -> Tensor:
    values: Tensor = value.score(hidden_states(value, rows)[rows.predicts])[:, 0].float()
    return values


def _scores(scorer: Any, groups: Sequence[Any], rows: Rows, like: Tensor) -> Tensor:
    if scorer is not None:
        scores: Tensor = scorer.score(hidden_states(scorer, rows)[rows.last])[:, 0].float()
        return scores
    texts = [" ".join(map(word, ids)) for group in groups for ids in group.response_ids]
    return torch.tensor(reward_of(texts, texts), device=like.device)


def _token_rewards(score: Tensor, penalty: Tensor, rows: Rows) -> Tensor:
    ends = torch.tensor(rows.lengths, device=score.device).cumsum(0) - 1
    return (-penalty).index_add(0, ends, score)


def _advantages(
    reward: Tensor, value: Tensor | None, rows: Rows, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (N,), by GAE with a value, else over each prompt's answers."""
    parts = reward.split(rows.lengths)
    if value is None:
        of_row = torch.stack([part.sum() for part in parts]).view(-1, num_samples)
        centred = of_row - of_row.mean(1, keepdim=True)
        lengths = torch.tensor(rows.lengths, device=reward.device)
        advantage = centred.flatten().repeat_interleave(lengths)
        return advantage, advantage
    found = []
    for rewards, values in zip(parts, value.split(rows.lengths), strict=True):
        following = torch.cat([values[1:], values.new_zeros(1)])
        running, backwards = torch.zeros(()), []
        for error in (rewards + following - values).flip(0).unbind():
            running = error + LAMBDA * running
            backwards.append(running)
        found.append(torch.stack(backwards).flip(0))
    advantage = torch.cat(found)
    return F.layer_norm(advantage, advantage.shape), advantage + value


def trainers_of(advantage: str) -> dict[str, Trainer]:
    """Return the trainers of an advantage by name."""
    trl = trl_gae if advantage == "gae" else trl_without_value
    found: dict[str, Trainer] = {
        "trl": trl,
        "careful eager": careful_ppo,
        "fastalign": fastalign_ppo,
    }
    if advantage == "gae":
        found["fastalign, share-policy"] = partial(fastalign_ppo, share_policy=True)
        found["fastalign, one-base"] = partial(fastalign_ppo, one_base=True)
    return found
