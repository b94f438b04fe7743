"""`fastalign eval`: accuracy on held-out pairs; reward and KL of fresh samples."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.cli.answers.sampling import (
    as_lines,
    load_sampled,
    read_prompts,
    sample,
    sample_rows,
)
from fastalign.cli.settings import EvalConfig, SampledModel
from fastalign.compute import Compute, require_finite
from fastalign.data.columns import RowColumns
from fastalign.data.load import load_examples
from fastalign.data.read import require_columns
from fastalign.data.tokenizer import Tokenizer, check_same_vocabulary
from fastalign.evaluation.measures import (
    best_of_n,
    best_of_n_kl_bound,
    mean_margin,
    preference_accuracy,
    sampled_kl,
)
from fastalign.evaluation.rewards import (
    RewardFunction,
    apply_reward,
    columns_of,
    load_reward,
)
from fastalign.evaluation.statistics import estimate_of_groups, summary
from fastalign.models.forward import sequence_logprobs
from fastalign.models.load import choose_packing
from fastalign.written_files import check_file, input_paths, write_file

SAMPLES = "samples.jsonl"  # beside the result


def compute_of(config: EvalConfig) -> Compute:
    """Return how the log-probs are computed, in a packing that is exact for both models."""
    trust = config.model.trust_remote_code
    paths = (config.model.path, config.reference.path)
    return config.model.compute(choose_packing(config.packing, paths, trust_remote_code=trust))


def judge_pairs(
    config: EvalConfig, policy: Any, reference: Any, tokenizer: Tokenizer
) -> dict[str, float | int]:
    """Return the accuracy and the margin of the implicit reward."""
    assert config.data.pairs is not None
    data = load_examples(
        config.data.pairs,
        "preference",
        tokenizer,
        max_length=config.data.max_length,
        ties="drop",
        advice="raise --data.max-length",
    )
    data.report.print_losses()
    compute = compute_of(config)
    policy_logprob = finite_logprobs(policy, data.groups, compute)
    reference_logprob = finite_logprobs(reference, data.groups, compute)
    accuracy = preference_accuracy(policy_logprob, reference_logprob, data.ties)
    margin = mean_margin(policy_logprob, reference_logprob, config.loss.beta)
    return {
        **summary("accuracy", accuracy),
        **summary("margin", margin),
        "num_ties": data.report.num_ties_dropped,
    }


def load_rewards(config: EvalConfig) -> dict[str, RewardFunction]:
    """Load `reward` and `best_of_reward`, if they are given, by these names.

    Raises:
        ValueError: if no row of the prompts has a column that one of them requires.
    """
    given = {"reward": config.reward, "best_of_reward": config.best_of_reward}
    sources = {name: source for name, source in given.items() if source is not None}
    found = {name: load_reward(source, config.model.compute()) for name, source in sources.items()}
    if config.data.prompts is not None:
        require_columns(config.data.prompts, taken_columns(config, found))
    return found


def taken_columns(config: EvalConfig, functions: Mapping[str, RewardFunction]) -> RowColumns:
    """Return the columns of a prompt's row that the rewards take."""
    return columns_of({f"{name}: {getattr(config, name)}": f for name, f in functions.items()})


def judge_samples(
    config: EvalConfig,
    policy: Any,
    reference: Any,
    tokenizer: Tokenizer,
    functions: Mapping[str, RewardFunction],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return reward and KL of fresh samples, and the samples."""
    assert config.data.prompts is not None
    columns = taken_columns(config, functions)
    prompts = read_prompts(config.data.prompts, policy, tokenizer, config.sampling, columns)
    completions = sample(config.model, policy, tokenizer, prompts.prompt_ids, config)
    rows = list(sample_rows(prompts, completions, tokenizer))
    groups = [
        Group(ids, [answer.token_ids for answer in answers])
        for ids, answers in zip(prompts.prompt_ids, completions, strict=True)
    ]
    compute = compute_of(config)
    kl = sampled_kl(
        finite_logprobs(policy, groups, compute), finite_logprobs(reference, groups, compute)
    )
    lengths = [[float(len(ids)) for ids in group.response_ids] for group in groups]
    result: dict[str, Any] = {**summary("kl", kl)}
    result |= summary("completion_tokens", estimate_of_groups(lengths))
    if functions:
        n = config.sampling.num_samples
        repeated = [prompt for prompt in prompts.prompts for _ in range(n)]
        texts = [row["completion"] for row in rows]
        values = prompts.columns_at(range(len(prompts)), n)
        scored = {
            name: apply_reward(function, repeated, texts, getattr(config, name), values)
            for name, function in functions.items()
        }
        rewards = scored["reward"]
        for row, reward in zip(rows, rewards, strict=True):
            row["reward"] = reward
        by_prompt = [rewards[start : start + n] for start in range(0, len(rewards), n)]
        result |= summary("reward", estimate_of_groups(by_prompt))
        result |= judge_best_of(config, rows, by_prompt, scored.get("best_of_reward"))
    result["share_unfinished"] = sum(r["finish_reason"] == "length" for r in rows) / len(rows)
    return result, rows


def finite_logprobs(model: Any, groups: Sequence[Group], compute: Compute) -> list[Tensor]:
    """Return `sequence_logprobs`; raise ValueError if one is not finite."""
    found = sequence_logprobs(model, groups, compute)
    require_finite(torch.cat(found), f"log-probs under {model.name_or_path}")
    return found


def judge_best_of(
    config: EvalConfig,
    rows: list[dict[str, Any]],
    rewards: list[list[float]],
    flat: list[float] | None,
) -> dict[str, Any]:
    """Return `best_of_n`: for each n the reward of the best of n and the bound of its KL.

    `flat` are the scores of the rows that the best is chosen by, or None: by the reward.
    """
    if not config.best_of:
        return {}
    scores = None
    if flat is not None:
        for row, score in zip(rows, flat, strict=True):
            row["best_of_score"] = score
        n = config.sampling.num_samples
        scores = [flat[start : start + n] for start in range(0, len(flat), n)]
    found = []
    for n in config.best_of:
        value = best_of_n(rewards, n, scores)
        found.append({"n": n, **summary("reward", value), "kl_bound": best_of_n_kl_bound(n)})
    return {"best_of_n": found}


def check(config: EvalConfig) -> None:
    """Raise ValueError unless the settings measure something, on samples of the policy itself."""
    if config.data.prompts is None and config.data.pairs is None:
        raise ValueError("data: expected data.prompts or data.pairs, got neither")
    if config.reward is not None and config.data.prompts is None:
        raise ValueError("data.prompts: the reward needs prompts to sample from, got none")
    if config.best_of and config.reward is None:
        raise ValueError("reward: the best of n needs a reward, got none")
    if config.best_of and min(config.best_of) < 1:
        raise ValueError(f"best_of: expected numbers of at least 1, got {min(config.best_of)}")
    if config.best_of_reward is not None and not config.best_of:
        raise ValueError("best_of_reward: expected best_of beside it, got none")
    exact = (config.sampling.temperature, config.sampling.top_p, config.sampling.top_k)
    if config.data.prompts is not None and exact != (1.0, 1.0, 0):
        raise ValueError(
            "sampling: the KL is of the policy itself: expected temperature 1, top_p 1, top_k 0, "
            f"got {exact}"
        )


def main(config: EvalConfig) -> int:
    """Run the command; return 0 when the JSON is written."""
    check(config)
    most = max(config.sampling.num_samples, *config.best_of, 1)
    config = replace(config, sampling=replace(config.sampling, num_samples=most))
    if Path(config.out).name == SAMPLES:
        raise ValueError(f"out: {SAMPLES} is the name of the samples beside it; choose another")
    inputs = input_paths(config)
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=inputs)
    samples = out.with_name(SAMPLES)
    if config.data.prompts is not None:
        check_file("out", samples, overwrite=config.overwrite, inputs=inputs)
    start = time.perf_counter()
    functions = load_rewards(config)
    policy, tokenizer = load_sampled(config.model)
    same = SampledModel(config.reference.path, config.model.trust_remote_code, config.model.device)
    reference, reference_tokenizer = load_sampled(same)
    check_same_vocabulary(tokenizer, reference_tokenizer)
    result: dict[str, Any] = {}
    if config.data.pairs is not None:
        result |= judge_pairs(config, policy, reference, tokenizer)
    rows: list[dict[str, Any]] = []
    if config.data.prompts is not None:
        found, rows = judge_samples(config, policy, reference, tokenizer, functions)
        result |= found
    result = {**result, "seconds": time.perf_counter() - start, "config": asdict(config)}
    if rows:
        write_file(samples, as_lines(rows), overwrite=config.overwrite)
    write_file(out, json.dumps(result, indent=1) + "\n", overwrite=config.overwrite)
    for name in ("reward", "kl", "accuracy"):
        if name in result:
            print(f"{name} {result[name]:.3f} +- {result[f'{name}_se']:.3f}")
    for row in result.get("best_of_n", ()):
        print(
            f"best of {row['n']}: reward {row['reward']:.3f} +- {row['reward_se']:.3f}, "
            f"KL to the model at most {row['kl_bound']:.3f}"
        )
    print(f"written to {out}")
    return 0
