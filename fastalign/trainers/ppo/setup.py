"""The inputs of every PPO step: models, sampler, prompts, reward sources, scale of scores."""

from dataclasses import dataclass

from fastalign.compute import Compute
from fastalign.data import PromptDataset, Tokenizer, load_sft
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.state import TrainState
from fastalign.trainers.ppo.config import PPOConfig
from fastalign.trainers.ppo.models import PPOModels, load_ppo_models
from fastalign.trainers.sampling.policy_sampler import AnySampler, open_policy_sampler
from fastalign.trainers.sampling.rollout import load_prompt_sets, scale_of_policy
from fastalign.trainers.sampling.score import RewardSources, ScoreScale, load_sources

# Among the numbers that a checkpoint holds.
SCORE_MEAN, SCORE_STD = "score_mean", "score_std"


@dataclass(frozen=True)
class PPOSetup:
    """The inputs of every step of a PPO run.

    Attributes:
        config: the run's settings.
        compute: device, dtype, packing and ranks of the forwards.
        models: policy, reference, value model.
        tokenizer: tokenizer of the policy.
        sampler: draws completions from the policy.
        sources: sources of the rewards.
        prompts: training prompts.
        held_out: prompts of the evaluation, or None.
        ptx: demonstrations that each update also learns, or None.
    """

    config: PPOConfig
    compute: Compute
    models: PPOModels
    tokenizer: Tokenizer
    sampler: AnySampler
    sources: RewardSources
    prompts: PromptDataset
    held_out: PromptDataset | None
    ptx: Examples | None


def prepare_ppo(config: PPOConfig, compute: Compute) -> PPOSetup:
    """Load models, reward sources, prompts and demonstrations; open the sampler.

    Raises:
        ValueError: if a setting, a file or a model is at fault.
        FileNotFoundError: if a file is not there.
    """
    sources = load_sources(config.reward, compute)
    models, tokenizer = load_ppo_models(config, compute)
    fewest = models.with_fewest_positions()
    prompts, held_out = load_prompt_sets(config.data, config.sampling, fewest, tokenizer)
    ptx = load_ptx(config, tokenizer, compute)
    return PPOSetup(
        config=config,
        compute=compute,
        models=models,
        tokenizer=tokenizer,
        sampler=open_policy_sampler(config, models.policy, tokenizer, compute),
        sources=sources,
        prompts=prompts,
        held_out=held_out,
        ptx=ptx,
    )


def load_ptx(config: PPOConfig, tokenizer: Tokenizer, compute: Compute) -> Examples | None:
    """Load the demonstrations of `ppo.ptx_data`, at most as long as a prompt with its answer."""
    if config.ppo.ptx_data is None:
        return None
    found = load_sft(
        config.ppo.ptx_data,
        tokenizer,
        max_length=config.data.max_length + config.sampling.max_new_tokens,
        on_bad_row=config.data.on_bad_row,
        on_too_long=config.data.on_too_long,
    )
    line = found.report.losses_line()
    if line is not None:
        print(line, flush=True)
    return measure_examples(found.groups, compute.packing)


def scale_of_scores(ppo: PPOSetup, state: TrainState) -> ScoreScale | None:
    """Return the scale of scores: measured before the first step, then held by checkpoints."""
    if not ppo.config.reward.normalise:
        return None
    if SCORE_MEAN not in state.kept:
        found = scale_of_policy(
            ppo.sampler,
            ppo.prompts,
            ppo.config.sampling,
            ppo.tokenizer,
            ppo.sources,
            run_seed=ppo.config.run.seed,
        )
        state.kept |= {SCORE_MEAN: found.mean, SCORE_STD: found.std}
        print(f"scores: mean {found.mean:.4g}, standard deviation {found.std:.4g}", flush=True)
    return ScoreScale(state.kept[SCORE_MEAN], state.kept[SCORE_STD])
