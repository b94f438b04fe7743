"""The trainers whose steps are compared, set up as their users would set them up.

TRL's trainers keep their defaults except for gradient checkpointing (off, as in ours), the dtype,
and the order of the rows. Both sides use AdamW, the same learning rates and schedule, and clip the
gradient norm at 1.
"""

import json
from typing import Any

from benchmarks import careful_eager
from benchmarks.step_cases import MAX_LENGTH
from benchmarks.step_worker import Clock, Job, Trainer


def fastalign_dpo(job: Job, clock: Clock) -> None:
    """Run `train_dpo`, which computes reference log-probs once, before the first step."""
    from fastalign.trainers import train_dpo

    _watch(job, clock)
    train_dpo(_dpo_config(job))


def fastalign_dpo_reference_in_the_step(job: Job, clock: Clock) -> None:
    """Run `train_dpo` and compute the reference's log-probs of the step's rows in every turn."""
    from fastalign.models.forward import sequence_logprobs
    from fastalign.models.load import load_policy
    from fastalign.runs.open import make_compute
    from fastalign.trainers import train_dpo

    _watch(job, clock)
    config = _dpo_config(job)
    compute = make_compute(config.train)
    reference = load_policy(job.reference, compute)
    clock.prologue = lambda: sequence_logprobs(reference, job.groups, compute)
    train_dpo(config)


def _dpo_config(job: Job) -> Any:
    from fastalign.trainers import DPOConfig, PreferenceDataConfig, ReferenceConfig

    reference = ReferenceConfig(str(job.reference), str(job.scratch / "cache"))
    return DPOConfig(
        data=PreferenceDataConfig(train=str(job.rows), max_length=MAX_LENGTH),
        reference=reference,
        **settings(job),
    )


def fastalign_sft(job: Job, clock: Clock) -> None:
    """Run `train_sft`."""
    from fastalign.runs.config import DataConfig
    from fastalign.trainers import SFTConfig, train_sft

    _watch(job, clock)
    data = DataConfig(train=str(job.rows), max_length=MAX_LENGTH)
    train_sft(SFTConfig(data=data, **settings(job)))


def fastalign_reward(job: Job, clock: Clock) -> None:
    """Run `train_reward`."""
    from fastalign.trainers import PreferenceDataConfig, RewardConfig, train_reward

    _watch(job, clock)
    data = PreferenceDataConfig(train=str(job.rows), max_length=MAX_LENGTH)
    train_reward(RewardConfig(data=data, **settings(job)))


def fastalign_answers(job: Job, clock: Clock) -> None:
    """Run the functions of `train_sft` on prompts with any number of trained responses."""
    from fastalign.models.load import load_policy
    from fastalign.runs.accumulate import measure_examples
    from fastalign.runs.config import OptimConfig
    from fastalign.runs.open import make_compute
    from fastalign.runs.state import TrainState, make_optimizer, optimiser_step
    from fastalign.trainers.sft import sft_gradient

    losses: list[float] = []
    clock.first_loss = lambda: losses[0]
    clock.watch()
    compute, optim = make_compute(_train_config(job)), OptimConfig()
    model = load_policy(job.policy, compute)
    state = TrainState(model, make_optimizer(model, optim))
    examples = measure_examples(job.groups, compute.packing)
    while True:
        total = sft_gradient(model, examples, range(len(job.groups)), compute)
        optimiser_step(state, [total], optim, job.num_steps)
        losses.append(total.loss)
        state.step += 1


def _train_config(job: Job) -> Any:
    from fastalign.runs.config import TrainConfig

    return TrainConfig(
        max_steps=job.num_steps,
        batch_size=len(job.groups),
        precision="bf16" if job.dtype == "bfloat16" else "float32",
        device=job.device,
    )


def settings(job: Job) -> dict[str, Any]:
    """Return the sections that the configurations of all of our trainers share."""
    from fastalign.runs.config import ModelConfig, RunConfig

    return {
        "model": ModelConfig(str(job.policy)),
        "run": RunConfig(str(job.scratch / "run")),
        "train": _train_config(job),
    }


def _watch(job: Job, clock: Clock) -> None:
    clock.first_loss = lambda: _logged_loss(job)
    clock.watch()


def _logged_loss(job: Job) -> float:
    first, *_ = (job.scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(first)["loss"])


def trl_dpo(job: Job, clock: Clock) -> None:
    """Run TRL's DPOTrainer with a separate reference model in every step."""
    _trl_dpo(job, clock, precompute_ref_log_probs=False)


def trl_dpo_precomputed(job: Job, clock: Clock) -> None:
    """Run TRL's DPOTrainer with reference log-probs precomputed before the first step."""
    _trl_dpo(job, clock, precompute_ref_log_probs=True)


def _trl_dpo(job: Job, clock: Clock, *, precompute_ref_log_probs: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    clock.watch()
    trainer = DPOTrainer(
        model=str(job.policy),
        ref_model=AutoModelForCausalLM.from_pretrained(job.reference, dtype=torch.float32),
        args=DPOConfig(precompute_ref_log_probs=precompute_ref_log_probs, **_trl_options(job)),
        **_trl_data(job),
    )
    if precompute_ref_log_probs:
        trainer.ref_model = None  # no longer needed; TRL would keep it in memory
    _run_trl(trainer, clock)


def trl_sft(job: Job, clock: Clock) -> None:
    """Run TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    clock.watch()
    _run_trl(
        SFTTrainer(str(job.policy), args=SFTConfig(**_trl_options(job)), **_trl_data(job)), clock
    )


def trl_reward(job: Job, clock: Clock) -> None:
    """Run TRL's RewardTrainer."""
    from trl import RewardConfig, RewardTrainer

    clock.watch()
    _run_trl(
        RewardTrainer(str(job.policy), args=RewardConfig(**_trl_options(job)), **_trl_data(job)),
        clock,
    )


def _trl_options(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(job.scratch / "run"),
        "per_device_train_batch_size": len(job.groups),
        "max_steps": job.num_steps,
        "max_length": MAX_LENGTH,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",  # every step takes the same rows
        "logging_first_step": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def _trl_data(job: Job) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    lines = job.rows.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return {
        "train_dataset": Dataset.from_list(rows * job.num_steps),  # one epoch
        "processing_class": AutoTokenizer.from_pretrained(job.policy),
    }


def _run_trl(trainer: Any, clock: Clock) -> None:
    clock.first_loss = lambda: float(trainer.state.log_history[0]["loss"])
    trainer.train()


# By comparison.
TRAINERS: dict[str, dict[str, Trainer]] = {
    "dpo-step": {
        "trl": trl_dpo,
        "trl, reference precomputed": trl_dpo_precomputed,
        "careful eager": careful_eager.dpo,
        "fastalign": fastalign_dpo,
        "fastalign, reference in the step": fastalign_dpo_reference_in_the_step,
    },
    "sft-step": {"trl": trl_sft, "careful eager": careful_eager.sft, "fastalign": fastalign_sft},
    "reward-step": {
        "trl": trl_reward,
        "careful eager": careful_eager.reward,
        "fastalign": fastalign_reward,
    },
}
