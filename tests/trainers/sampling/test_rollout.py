"""Prompts, samples of the live policy, and scores from several sources."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastalign.data.load import PromptDataset
from fastalign.data.report import DataReport
from fastalign.data.tokenizer import load_tokenizer, num_foreign_ids
from fastalign.evaluation.rewards import source_names
from fastalign.models.load import load_policy, save_reward_model
from fastalign.models.reward import RewardScale, set_pad_token
from fastalign.rollouts import Completion, SamplingParams
from fastalign.rollouts.transformers_sampler import PolicySampler
from fastalign.runs.config import TrainConfig
from fastalign.runs.open import make_compute
from fastalign.trainers.sampling.config import PromptDataConfig, RewardSourceConfig
from fastalign.trainers.sampling.rollout import (
    FOREIGN_IDS,
    Rollouts,
    SamplingSetup,
    final_scores,
    load_prompt_sets,
    load_sources,
    roll_out,
    rollout_seed,
    scale_of,
)
from tests.small_runs import WORDS, prompts_file, words_reward, write_rows
from tests.tiny import put_adapter, tiny_reward_model
from tests.tokenizers import CHATML, make_tokenizer

PARAMS = SamplingParams(max_new_tokens=6, num_samples=3)


ON_CPU = make_compute(TrainConfig(device="cpu"))


def letters(prompts: list[Any], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def rolled(folder: Path, *, adapted: bool = False, **options: Any) -> Rollouts:
    compute = make_compute(TrainConfig(device="cpu", precision=options.pop("precision", "auto")))
    model = load_policy(folder / "llama")
    if adapted:
        put_adapter(model)
    if options.pop("train_mode", False):
        model.gradient_checkpointing_enable()
        model.train()
    tokenizer = load_tokenizer(folder / "llama")
    data = PromptDataConfig(train=prompts_file(folder))
    prompts, _ = load_prompt_sets(data, PARAMS, [model], tokenizer)
    sampler = PolicySampler(model, tokenizer, str(folder / "llama"), compute)
    config = RewardSourceConfig(sources=(words_reward(folder),), **options)
    indices, training = [3, 0, 3], model.training
    found = roll_out(
        sampler,
        prompts,
        indices,
        PARAMS,
        tokenizer,
        load_sources(config, ON_CPU),
        seed=7,
    )
    assert model.training == training
    return found


def test_the_order_is_the_prompts_then_the_samples(folder: Path) -> None:
    found = rolled(folder)
    tokenizer = load_tokenizer(folder / "llama")
    assert found.prompts == ["The menu", "The battery", "The menu"]
    for group, answers, texts in zip(found.groups, found.completions, found.texts, strict=True):
        assert group.response_ids == [answer.token_ids for answer in answers]
        assert [tokenizer.decode(i, skip_special_tokens=True) for i in group.response_ids] == texts
    flat = [answer for answers in found.completions for answer in answers]
    assert found.ended.tolist() == [answer.token_ids[-1] == 2 for answer in flat]
    assert found.completions[0] != found.completions[2], "the same prompt twice is sampled twice"
    lengths = [len(answer.token_ids) for answer in flat]
    assert found.metrics["completions/mean_length"] == sum(lengths) / 9
    assert found.metrics["completions/min_length"] == min(lengths)
    assert found.metrics["completions/max_length"] == max(lengths)
    assert found.metrics["completions/clipped_ratio"] == 1 - found.ended.float().mean().item()


def test_rewards_are_of_prompt_and_completion(folder: Path) -> None:
    found = rolled(folder)
    texts = [
        prompt + text
        for prompt, texts in zip(found.prompts, found.texts, strict=True)
        for text in texts
    ]
    expected = [
        0.5 + sum(place for place, word in enumerate(WORDS) if word in in_it)
        for in_it in (set(re.findall(r"[a-z][a-z']*", text.lower())) for text in texts)
    ]
    assert len(set(expected)) > 1
    assert found.rewards.tolist() == pytest.approx(expected)
    assert found.metrics["rewards/words/mean"] == pytest.approx(sum(expected) / 9)
    assert found.metrics["reward"] == found.metrics["rewards/words/mean"]


@pytest.mark.parametrize("options", [{"adapted": True}, {"train_mode": True}])
def test_the_same_seed_draws_the_same_tokens_in_whatever_mode(
    folder: Path, options: dict[str, bool]
) -> None:
    found, again = rolled(folder, **options), rolled(folder, **options)
    assert found.completions == again.completions
    plain = rolled(folder)
    assert (found.completions == plain.completions) == ("adapted" not in options)


def test_samples_are_drawn_in_the_products_dtype(folder: Path) -> None:
    exact, low = rolled(folder), rolled(folder, precision="bf16")
    difference = abs(exact.completions[0][0].logprobs[0] - low.completions[0][0].logprobs[0])
    assert 0 < difference < 0.5


def test_seeds_differ_between_steps_purposes_and_runs() -> None:
    seeds = {rollout_seed(s, p, n) for s in range(3) for p in ("rollouts", "eval") for n in (0, 1)}
    assert len(seeds) == 12
    assert rollout_seed(5, "rollouts", 3) == rollout_seed(5, "rollouts", 3)


def test_several_sources_are_a_weighted_sum(folder: Path) -> None:
    model = tiny_reward_model("llama", vocab_size=320)
    set_pad_token(model, 0)
    save_reward_model(model, make_tokenizer(), folder / "rm" / "model")
    sources = (
        words_reward(folder),
        "tests.trainers.sampling.test_rollout:letters",
        f"{folder}/rm/model",
    )
    both = load_sources(
        RewardSourceConfig(sources, weights=(2.0, -0.5, 1.0)),
        ON_CPU,
    )
    assert both.names == ("words", "tests.trainers.sampling.test_rollout:letters", "rm")
    prompts, texts = ["The menu", "The screen"], [" best", ""]
    total, metrics = both.score(prompts, texts)
    alone = [load_sources(RewardSourceConfig((s,)), ON_CPU).score(prompts, texts) for s in sources]
    assert alone[0][0].tolist() == [14.5, 2.5]
    assert alone[1][0].tolist() == [5.0, 0.0]
    expected = 2 * alone[0][0] - 0.5 * alone[1][0] + alone[2][0]
    torch.testing.assert_close(total, expected)
    assert metrics["rewards/rm/mean"] == pytest.approx(alone[2][0].mean().item())
    assert metrics["reward"] == pytest.approx(expected.mean().item())


def test_sources_of_one_name_are_numbered() -> None:
    assert source_names(["a/model", "b/a", "c.json", "m:f"]) == ("a-1", "a-2", "c", "m:f")


def test_a_score_is_scaled_and_a_missing_end_costs() -> None:
    config = RewardSourceConfig(("m:f",), missing_eos_penalty=1.5)
    rewards, ended = torch.tensor([3.0, 7.0], dtype=torch.float64), torch.tensor([True, False])
    assert final_scores(config, rewards, ended, None).tolist() == [3.0, 5.5]
    assert final_scores(config, rewards, ended, RewardScale(5.0, 2.0)).tolist() == [-1.0, -0.5]
    assert scale_of([1.0, 3.0, 5.0, 3.0]) == RewardScale(3.0, 2**0.5)
    with pytest.raises(ValueError, match=r"reward\.normalise: the 2 completions .* reward 4;"):
        scale_of([4.0, 4.0])


def test_the_scale_is_of_256_samples_of_the_policy(folder: Path) -> None:
    compute = ON_CPU
    model, tokenizer = load_policy(folder / "llama"), load_tokenizer(folder / "llama")
    prompts, _ = load_prompt_sets(
        PromptDataConfig(train=prompts_file(folder)), PARAMS, [model], tokenizer
    )
    seen: list[int] = []

    def count(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append(len(completions))
        return letters(prompts, completions)

    sources = load_sources(
        RewardSourceConfig(("tests.trainers.sampling.test_rollout:letters",)),
        ON_CPU,
    )
    sources = type(sources)(sources.names, (count,), sources.weights)
    sampler = PolicySampler(model, tokenizer, str(folder / "llama"), compute)
    config = SimpleNamespace(sampling=PARAMS, run=SimpleNamespace(seed=1))
    setup = SamplingSetup(
        config=config,
        compute=compute,
        tokenizer=tokenizer,
        sampler=sampler,
        sources=sources,
        prompts=prompts,
        held_out=None,
    )
    scale = setup.measure_scale()
    assert seen == [256]
    assert 1 < scale.std < scale.mean < 60


def test_prompts_leave_room_for_the_answer(folder: Path) -> None:
    model, tokenizer = load_policy(folder / "llama"), load_tokenizer(folder / "llama")
    source = write_rows(folder / "long.jsonl", [{"prompt": "yes " * 10}, {"prompt": "yes"}])
    data = PromptDataConfig(train=str(source))
    # 64 positions
    load_prompt_sets(data, SamplingParams(max_new_tokens=20), [model], tokenizer)
    with pytest.raises(ValueError, match=r"long\.jsonl:1: expected at most 9 tokens"):
        load_prompt_sets(data, SamplingParams(max_new_tokens=55), [model], tokenizer)
    skipping = PromptDataConfig(train=str(source), eval=str(source), on_too_long="skip")
    train, held_out = load_prompt_sets(
        skipping, SamplingParams(max_new_tokens=55), [model], tokenizer
    )
    assert held_out is not None
    assert list(train.prompts) == list(held_out.prompts) == ["yes"]
    assert train.fingerprint == held_out.fingerprint
    assert train.fingerprint != load_prompt_sets(data, PARAMS, [model], tokenizer)[0].fingerprint
    with pytest.raises(ValueError, match=r"sampling\.max_new_tokens: expected less than .* 64"):
        load_prompt_sets(data, SamplingParams(max_new_tokens=64), [model], tokenizer)


def test_conversations_are_rolled_out(folder: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    model = load_policy(folder / "llama")
    rows = [{"prompt": [{"role": "user", "content": f"Which {word}?"}]} for word in WORDS]
    data = PromptDataConfig(train=str(write_rows(folder / "chats.jsonl", rows)))
    prompts, _ = load_prompt_sets(data, PARAMS, [model], tokenizer)
    seen: list[Any] = []

    def note(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(completions)

    sources = load_sources(
        RewardSourceConfig(("tests.trainers.sampling.test_rollout:letters",)),
        ON_CPU,
    )
    sources = type(sources)(sources.names, (note,), sources.weights)
    compute = ON_CPU
    sampler = PolicySampler(model, tokenizer, str(folder / "llama"), compute)
    found = roll_out(sampler, prompts, [1], PARAMS, tokenizer, sources, seed=0)
    assert seen == [rows[1]["prompt"]] * 3
    assert tokenizer.decode(found.groups[0].prompt_ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, r"reward\.sources: expected at least one"),
        ({"sources": ("a:b", "c:d"), "weights": (1.0,)}, r"reward\.weights: expected 2, .* got 1"),
        ({"sources": ("a:b",), "weights": (float("nan"),)}, r"reward\.weights: .*, got nan"),
        ({"sources": ("a:b",), "missing_eos_penalty": -1.0}, r"missing_eos_penalty: .*got -1\.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSourceConfig(**options)


def test_a_source_that_returns_nonsense_is_named() -> None:
    sources = load_sources(
        RewardSourceConfig(("tests.trainers.sampling.test_rollout:nonsense",)),
        ON_CPU,
    )
    with pytest.raises(ValueError, match=r"sources: .*:nonsense: reward: expected a finite"):
        sources.score(["a"], ["b"])


def nonsense(prompts: list[Any], completions: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


def test_sampled_ids_that_are_no_token_are_counted_and_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(folder / "llama")
    assert FOREIGN_IDS not in rolled(folder).metrics
    ids = [[3, 320, 999], [5]]
    assert num_foreign_ids(tokenizer, ids) == 2

    class Padded:
        def generate(self, prompts: Any, params: Any, *, seed: int) -> list[list[Completion]]:
            return [[Completion(list(i), [0.0] * len(i), "length") for i in ids] for _ in prompts]

    config = RewardSourceConfig(sources=(words_reward(folder),))
    setup: Any = SamplingSetup(
        config=SimpleNamespace(run=SimpleNamespace(seed=0), sampling=PARAMS),
        compute=ON_CPU,
        tokenizer=tokenizer,
        sampler=Padded(),  # type: ignore[arg-type]
        sources=load_sources(config, ON_CPU),
        prompts=PromptDataset([[1, 5]], ["The"], ["a:1"], DataReport("a"), ""),
        held_out=None,
    )
    params = SamplingParams(max_new_tokens=6, num_samples=2)
    setup.config.sampling = params
    assert setup.roll_out([0, 0], 1).metrics[FOREIGN_IDS] == 4
    setup.roll_out([0], 2)
    out = capsys.readouterr().out
    assert out.count("4 sampled ids are no token of the tokenizer, which has 320") == 1
    assert out.count("sampled ids") == 1
