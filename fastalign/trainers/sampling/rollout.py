"""Rollouts: prompts, completions of the policy as it stands, their rewards and scores."""

import inspect
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Self

import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.batch.schedule import indices_of_step
from fastalign.compute import Compute
from fastalign.data.columns import RowColumns
from fastalign.data.conversation import content_as_json
from fastalign.data.examples import Content
from fastalign.data.load import (
    PromptDataset,
    load_prompts,
    load_sources_of_data,
    print_sources,
)
from fastalign.data.read import NO_COLUMNS, require_columns
from fastalign.data.tokenizer import (
    Tokenizer,
    eos_token_ids,
    foreign_ids_line,
    num_foreign_ids,
    print_added_tokens,
)
from fastalign.data_sources import WeightedSource, weighted_sources
from fastalign.evaluation.rewards import (
    ModelReward,
    RewardFunction,
    apply_reward,
    columns_of,
    is_reward_network,
    load_reward,
    source_names,
)
from fastalign.in_memory import GivenReward
from fastalign.models.architecture import num_positions
from fastalign.models.lora import adapter_rank, has_adapter
from fastalign.models.reward import AdapterModel, RewardScale
from fastalign.progress import advance, phase, restart
from fastalign.ranks.errors import UserCodeFailed
from fastalign.ranks.world import ALONE, World
from fastalign.rollouts import (
    Completion,
    EngineSpec,
    OverlappedSampler,
    RankZeroSampler,
    Sampler,
    SamplerFailed,
    SamplingParams,
    SyncedSampler,
    access_to,
    open_engine,
)
from fastalign.rollouts.transformers_sampler import PolicySampler, sampling_mode
from fastalign.runs.inputs import Inputs, Parts, digest_of, file_parts, model_parts
from fastalign.runs.metrics import Metrics
from fastalign.trainers.sampling.config import (
    PromptDataConfig,
    RewardSourceConfig,
    SampledTrainingConfig,
)

# Prompts that the scale of scores is measured on, as openai/lm-human-preferences has them.
NUM_SCALE_SAMPLES = 256
FOREIGN_IDS = "sampling/num_ids_without_token"
ROLLOUTS, HELD_OUT = "rollouts", "eval"  # uses of samples, of which their seeds are made
GENERATION = {HELD_OUT: "held-out generation"}
ERRORS = (UserCodeFailed, ValueError, OSError)  # of a reward function, raised on every rank


@dataclass(frozen=True)
class RewardSources:
    """Loaded sources; the three are parallel.

    Attributes:
        names: distinct names of the sources in the metrics.
        functions: (prompts, completions, and columns of the prompts' rows by name) -> numbers.
        weights: weight of each source in the sum.
        world: the ranks, all of which ask for the same scores.
    """

    names: tuple[str, ...]
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    world: World = ALONE

    @property
    def columns(self) -> RowColumns:
        """The columns of a prompt's row that the functions take."""
        names = (f"reward.sources: {name}" for name in self.names)
        return columns_of(dict(zip(names, self.functions, strict=True)))

    def score(
        self,
        prompts: Sequence[Content],
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the weighted sum of rewards of each completion, (R,) float64, and metrics.

        The arguments and errors are those of `rewards`.
        """
        return self.sum_of(self.rewards(prompts, texts, columns))

    def rewards(
        self,
        prompts: Sequence[Content],
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, list[float]]:
        """Return the rewards of the completions by each source, by its name.

        `columns` are values of the prompts' rows, one for each completion.

        Raises:
            ValueError: if a source returns another number of rewards, or one that is not finite.
            UserCodeFailed: if a source is a function that raises an error.
        """
        found: dict[str, list[float]] = {}
        for name, function in zip(self.names, self.functions, strict=True):
            work = partial(apply_reward, function, prompts, texts, columns=columns)
            try:
                # A model's work is shared by all ranks; any other function is rank 0's alone.
                shared = isinstance(function, ModelReward)
                with phase(f"rewards by {name}", len(texts), "completions"):
                    found[name] = work() if shared else self.world.first_does(work, ERRORS)
                    advance(0 if shared else len(texts))  # a model advances by its batches
            except ValueError as error:
                raise ValueError(f"reward.sources: {name}: {error}") from error
            except UserCodeFailed as error:
                error.args = (f"reward.sources: {name}: {error}",)
                raise
        return found

    def sum_of(self, rewards: Mapping[str, Sequence[float]]) -> tuple[Tensor, Metrics]:
        """Return the weighted sum of each completion's rewards, (R,) float64, and metrics."""
        (count,) = {len(values) for values in rewards.values()}
        total = torch.zeros(count, dtype=torch.float64)
        metrics: Metrics = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            total += weight * torch.tensor(rewards[name], dtype=torch.float64)
            metrics[f"rewards/{name}/mean"] = fmean(rewards[name])
        metrics["reward"] = total.mean().item()
        metrics["reward_std"] = total.std(correction=0).item()
        return total, metrics


def load_sources(
    config: RewardSourceConfig,
    compute: Compute,
    data: PromptDataConfig | None = None,
    opened: Mapping[str, AdapterModel] | None = None,
) -> RewardSources:
    """Load every source; reward models go to the run's device, sharded as its other models.

    Before any model is loaded, the columns that functions require are looked for in the `data`.
    `opened` are reward models on the policy's base, by their folders.

    Raises:
        ValueError: if a source cannot be loaded, or no row of the data has a required column.
        FileNotFoundError: if a file does not exist.
    """
    light = [source for source in config.sources if not is_reward_network(source)]
    found = {source: load_reward(source, compute) for source in light}
    if data is not None:
        columns = columns_of({f"reward.sources: {s}": f for s, f in found.items()})
        files = [source.path for source in weighted_sources(data.train)]
        for file in [*files, *([] if data.eval is None else [data.eval])]:
            require_columns(file, columns)
    return RewardSources(
        names=source_names(config.sources),
        functions=tuple(
            found[source]
            if source in found
            else load_reward(source, compute, (opened or {}).get(source))
            for source in config.sources
        ),
        weights=config.weights or (1.0,) * len(config.sources),
        world=compute.world,
    )


def reward_parts(function: RewardFunction, source: str) -> Parts:
    """Return what decides a source's scores: a model's weights, or the bytes of its files.

    Of a Python function these are the file that defines it and the module that was named, of one in
    memory its own source text; what these import or call is not looked at.
    """
    if isinstance(function, ModelReward):
        return model_parts(function.model)
    if isinstance(source, GivenReward):
        text = source.source()
        return {} if text is None else {"source text": digest_of(text)}
    if source.endswith(".json"):
        return file_parts(source)
    module = sys.modules[source.partition(":")[0]]
    named = (inspect.unwrap(function), getattr(function, "__call__", None), module)  # noqa: B004
    parts: dict[str, Any] = {}
    for thing in named:
        try:
            file = inspect.getsourcefile(thing)  # type: ignore[arg-type]
        except TypeError:  # an object without a file of its own
            continue
        if file is not None and Path(file).is_file():
            parts |= file_parts(file)
    return parts


def scale_of(rewards: Sequence[float]) -> RewardScale:
    """Measure the scale of the starting policy's rewards.

    Raises:
        ValueError: if all rewards are the same.
    """
    scale = RewardScale(fmean(rewards), pstdev(rewards))
    if not scale.std > 0:
        raise ValueError(
            f"reward.normalise: the {len(rewards)} completions that scores are measured on all "
            f"have the reward {scale.mean:g}; there is nothing to scale by"
        )
    return scale


def final_scores(
    config: RewardSourceConfig, rewards: Tensor, ended: Tensor, scale: RewardScale | None
) -> Tensor:
    """Return the scores to train on: rewards (R,), scaled, less a penalty where not `ended`.

    Returns:
        (R,) float32.
    """
    scores = rewards if scale is None else scale.normalise(rewards)
    return (scores - config.missing_eos_penalty * (~ended).to(scores.dtype)).float()


@dataclass(frozen=True)
class Rollouts:
    """Completions of some prompts; everything is in the prompts' order, then in the samples'.

    R responses: all samples of the first prompt, then of the second.

    Attributes:
        groups: each prompt with its responses, every token of which is trained.
        completions: for each prompt, as sampled.
        prompts: for each prompt, plain text or messages.
        texts: for each prompt, its completions without special tokens.
        rewards: (R,) float64, the sources' weighted sum.
        parts: R rewards of each source, by its name.
        columns: for each prompt, the values of its row that reward functions take, by name.
        ended: (R,) bool, whether there is an EOS.
        metrics: `reward`, `rewards/...`, `completions/...`, `time/...`,
            and the version of the policy that they are of.
    """

    groups: list[Group]
    completions: list[list[Completion]]
    prompts: list[Content]
    texts: list[list[str]]
    rewards: Tensor
    parts: dict[str, list[float]]
    columns: list[Mapping[str, Any]]
    ended: Tensor
    metrics: Metrics


def load_prompt_sets(
    data: PromptDataConfig,
    params: SamplingParams,
    models: Sequence[Any],
    tokenizer: Tokenizer,
    columns: RowColumns = NO_COLUMNS,
) -> tuple[PromptDataset, PromptDataset | None]:
    """Load the training prompts, and held-out ones if there are any, with their rows' `columns`.

    All leave room for an answer in the model with the fewest positions.

    Raises:
        ValueError: if a source is at fault, naming file and row.
        FileNotFoundError: if a file does not exist.
    """
    limits = [num_positions(model.config) for model in models]
    limit = min(limit or 2**31 for limit in limits)
    room = limit - params.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens: expected less than the model's {limit} positions, "
            f"got {params.max_new_tokens}"
        )
    remedy = "raise --data.max-length"
    if room < data.max_length:
        remedy = f"lower --sampling.max-new-tokens (the model has {limit} positions)"
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        max_length=min(data.max_length, room),
        on_bad_row=data.on_bad_row,
        on_too_long=data.on_too_long,
        advice=f"{remedy}, or use --data.on-too-long skip",
        columns=columns,
    )
    named = [weighted_sources(data.train)]
    if data.eval is not None:
        named.append([WeightedSource(data.eval)])
    sets = [load_sources_of_data(sources, load) for sources in named]
    for found in sets:
        found.report.print_losses()
    print_sources(sets[0].parts)
    if has_adapter(models[0]):
        print_added_tokens(tokenizer, sets[0].prompt_ids)
    return sets[0], sets[1] if len(sets) > 1 else None


AnySampler = PolicySampler | SyncedSampler | OverlappedSampler | RankZeroSampler


def overlapped(sampler: AnySampler) -> OverlappedSampler | RankZeroSampler | None:
    """Return the sampler if it samples a step while the one before trains, else None."""
    if isinstance(sampler, RankZeroSampler):
        return sampler if sampler.overlaps else None
    return sampler if isinstance(sampler, OverlappedSampler) else None


def open_policy_sampler(
    config: SampledTrainingConfig, model: Any, tokenizer: Tokenizer, compute: Compute
) -> AnySampler:
    """Open the sampler that `--sampler` names on the policy that is being trained.

    Raises:
        ValueError: if vLLM is not installed, or cannot run this model or these settings.
        SamplerFailed: if an engine does not start, or no server answers in time.
    """
    path = config.model.path
    if config.sampler == "transformers":
        return PolicySampler(model, tokenizer, path, compute)
    world = compute.world
    if config.sampler == "vllm" and (world.size > 1 or compute.parallel.strategy == "fsdp"):
        raise ValueError(
            "sampler: vllm in the trainer's process goes with one rank and whole weights; expected "
            "vllm-server or transformers with several ranks or --parallel.strategy fsdp"
        )
    policy = access_to(model, partial(sampling_mode, model, compute), world)

    def opened() -> SyncedSampler | OverlappedSampler:
        spec = EngineSpec(
            model.config,
            eos_token_ids=eos_token_ids(tokenizer, path),
            dtype=compute.dtype,
            max_length=config.data.max_length + config.sampling.max_new_tokens,
            options=config.vllm,
            lora_rank=adapter_rank(model),
        )
        sampler = open_engine(config.sampler, spec, policy, on_progress=advance, on_rebuild=restart)
        return OverlappedSampler(sampler) if config.vllm.overlap else sampler

    if world.size == 1:
        return opened()
    found: list[SyncedSampler | OverlappedSampler] = []
    world.first_does(lambda: found.append(opened()), (SamplerFailed, ValueError, OSError))
    return RankZeroSampler(found[0] if found else None, policy, world)


def rollout_seed(run_seed: int, purpose: str, step: int) -> int:
    """Return the seed of one step's samples, so that a resumed run draws the same tokens."""
    # A string is hashed with SHA-512, so neighbouring seeds and steps are unrelated.
    return random.Random(f"{run_seed}/{purpose}/{step}").getrandbits(60)


def roll_out(
    sampler: Sampler,
    prompts: PromptDataset,
    indices: Sequence[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    sources: RewardSources,
    *,
    seed: int,
    what: str = "generation",
) -> Rollouts:
    """Sample `params.num_samples` completions of each prompt and score their texts.

    `indices` may hold a prompt twice, which is then sampled twice; one `seed` draws the same tokens
    from the same policy. While it lasts, the sampling is shown as `what`.

    Raises:
        ValueError: if the sampler or a reward source raises it.
    """
    prompt_ids = [prompts.prompt_ids[i] for i in indices]
    contents = [prompts.prompts[i] for i in indices]
    start = time.perf_counter()
    with phase(what, len(prompt_ids) * params.num_samples, "completions"):
        completions = sampler.generate(prompt_ids, params, seed=seed)
    sampled = time.perf_counter()
    texts = [
        [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        for answers in completions
    ]
    repeated = [content for content in contents for _ in range(params.num_samples)]
    parts = sources.rewards(
        repeated,
        [text for answers in texts for text in answers],
        prompts.columns_at(indices, params.num_samples),
    )
    rewards, metrics = sources.sum_of(parts)
    seconds = {
        "time/generate_seconds": sampled - start,
        "time/score_seconds": time.perf_counter() - sampled,
    }
    flat = [answer for answers in completions for answer in answers]
    version = {"sampling/policy_version": flat[0].version}
    foreign = num_foreign_ids(tokenizer, (answer.token_ids for answer in flat))
    if foreign:  # the metric is there in such steps only
        version[FOREIGN_IDS] = foreign
    return Rollouts(
        groups=[
            Group(ids, [answer.token_ids for answer in answers])
            for ids, answers in zip(prompt_ids, completions, strict=True)
        ],
        completions=completions,
        prompts=contents,
        texts=texts,
        rewards=rewards,
        parts=parts,
        columns=[prompts.columns[i] for i in indices] if prompts.columns else [{}] * len(indices),
        ended=torch.tensor([answer.finish_reason == "stop" for answer in flat]),
        metrics=metrics | length_metrics(flat) | version | seconds,
    )


def length_metrics(completions: Sequence[Completion]) -> Metrics:
    """Return TRL's `completions/{mean,min,max}_length` and `clipped_ratio` (without an EOS)."""
    lengths = [len(answer.token_ids) for answer in completions]
    unfinished = sum(answer.finish_reason == "length" for answer in completions)
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": unfinished / len(lengths),
    }


def sample_rows(
    rollouts: Rollouts, number: int, *, step: int, held_out: bool
) -> list[dict[str, Any]]:
    """Return a row for each of the first `number` completions, as `samples.jsonl` has them.

    A row also has the columns that reward functions take, and the rewards of several sources.
    """
    rows: list[dict[str, Any]] = []
    of_prompts = zip(
        *(rollouts.prompts, rollouts.columns, rollouts.groups),
        *(rollouts.texts, rollouts.completions),
        strict=True,
    )
    for prompt, columns, group, texts, completions in of_prompts:
        for text, completion in zip(texts, completions, strict=True):
            place = len(rows)
            if place == number:
                return rows
            parts = {name: values[place] for name, values in rollouts.parts.items()}
            row = {
                **columns,
                "step": step,
                "held_out": held_out,
                "prompt": content_as_json(prompt),
                "completion": text,
                "reward": rollouts.rewards[place].item(),
                **({"rewards": parts} if len(parts) > 1 else {}),
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": len(group.prompt_ids),
                "num_completion_tokens": len(completion.token_ids),
            }
            rows.append(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class SamplingSetup:
    """The inputs of every step of an algorithm that samples; a subclass adds its models.

    Attributes:
        config: the run's settings.
        compute: device, dtype, packing and ranks of the forwards.
        tokenizer: tokenizer of the policy.
        sampler: draws completions from the policy.
        sources: sources of the rewards.
        prompts: training prompts.
        held_out: prompts of the evaluation, or None.
        said: what is printed once in a run.
        drawn: latest rollouts that `take_samples` has not taken, by their use.
    """

    config: Any
    compute: Compute
    tokenizer: Tokenizer
    sampler: AnySampler
    sources: RewardSources
    prompts: PromptDataset
    held_out: PromptDataset | None
    said: list[str] = field(default_factory=list)
    drawn: dict[str, Rollouts] = field(default_factory=dict)

    def inputs(self, reference_fingerprint: str | None) -> Inputs:
        """Return what a resumed run must find again, the sources of the rewards among it."""
        functions = zip(self.sources.names, self.sources.functions, strict=True)
        specifications = self.config.reward.sources
        reward: dict[str, Any] = {}
        for (name, function), source in zip(functions, specifications, strict=True):
            reward |= {f"{name}: {k}": v for k, v in reward_parts(function, source).items()}
        others = {"reward": reward}
        return Inputs(self.tokenizer, self.held_out, reference_fingerprint, others)

    def roll_out(self, indices: Sequence[int], step: int) -> Rollouts:
        """Sample and score answers to these training prompts."""
        found = self._draw(self.prompts, indices, self.config.sampling, ROLLOUTS, step)
        self.drawn[ROLLOUTS] = found
        return found

    def roll_out_held_out(self) -> Rollouts:
        """Sample and score one answer to each held-out prompt.

        The seed is the same at every step, so that evaluations differ by the policy alone.
        """
        prompts = self.held_out
        assert prompts is not None
        single = replace(self.config.sampling, num_samples=1)
        found = self._draw(prompts, range(len(prompts)), single, HELD_OUT, 0)
        self.drawn[HELD_OUT] = found
        return found

    def take_samples(self, step: int, num_steps: int) -> list[dict[str, Any]]:
        """Return the rows of `samples.jsonl` for what was drawn in a step, from 1 to `num_steps`.

        Held-out completions are written at each evaluation, those that were trained on in the first
        step, in each that `samples.every` divides, and in the last.
        """
        every, number = self.config.samples.every, self.config.samples.num_completions
        trained_on, held_out = (self.drawn.pop(use, None) for use in (ROLLOUTS, HELD_OUT))
        rows: list[dict[str, Any]] = []
        if trained_on is not None and (step in (1, num_steps) or step % every == 0):
            rows += sample_rows(trained_on, number, step=step, held_out=False)
        if held_out is not None:
            rows += sample_rows(held_out, number, step=step, held_out=True)
        return rows

    def of_first_held_out(self, step: int) -> Self:
        """Return the same with the first held-out prompt alone, to try an evaluation on it.

        `step` is the number of steps taken, which names the policy's version for the sampler.
        """
        assert self.held_out is not None
        self.sampler.version = step
        return replace(self, held_out=self.held_out.first(), drawn={})

    def measure_scale(self) -> RewardScale:
        """Measure the scale of scores on one sample of each of 256 prompts.

        Raises:
            ValueError: if all rewards are the same.
        """
        seed = self.config.run.seed
        indices = indices_of_step(self.prompts.mixture, NUM_SCALE_SAMPLES, 0, seed=seed)
        single = replace(self.config.sampling, num_samples=1)
        return scale_of(self._draw(self.prompts, indices, single, "scale", 0).rewards.tolist())

    def _draw(
        self,
        prompts: PromptDataset,
        indices: Sequence[int],
        params: SamplingParams,
        purpose: str,
        step: int,
    ) -> Rollouts:
        seed = rollout_seed(self.config.run.seed, purpose, step)
        found = roll_out(
            self.sampler,
            prompts,
            indices,
            params,
            self.tokenizer,
            self.sources,
            seed=seed,
            what=GENERATION.get(purpose, "generation"),
        )
        number = int(found.metrics.get(FOREIGN_IDS, 0))
        if number and not self.said:
            self.said.append(f"{foreign_ids_line(self.tokenizer, number)} ({FOREIGN_IDS})")
            print(self.said[0])
        return found
