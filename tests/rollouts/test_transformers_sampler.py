"""The sampler: exact log-probs of what was drawn, seeds a completion, EOS as the trainer counts."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.models.forward import sequence_logprobs
from fastalign.rollouts import SamplingParams, TransformersSampler, transformers_sampler
from fastalign.rollouts.distribution import draw
from tests.tiny import AS_PACKED, SETTINGS, tiny_model

PROMPTS = [[1, 5, 9], [1], [1, 7, 30, 31, 32, 33], [1, 5, 9]]


def sampler(model: Any, rows: int = 256, eos: tuple[int, ...] = (2,)) -> TransformersSampler:
    return TransformersSampler(model, eos_token_ids=eos, pad_token_id=2, rows_per_batch=rows)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "by-transformers"])
@pytest.mark.parametrize("architecture", SETTINGS)
def test_log_probs_are_the_trainers(
    architecture: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths, answers longer than a sliding window."""
    if not packed:
        found = replace(AS_PACKED, decodes=False)
        monkeypatch.setattr(transformers_sampler, "verdict_of", lambda model: found)
    model = tiny_model(architecture)
    params = SamplingParams(max_new_tokens=12, num_samples=3)
    completions = sampler(model).generate(PROMPTS, params, seed=1)
    groups = [
        Group(prompt, [answer.token_ids for answer in answers])
        for prompt, answers in zip(PROMPTS, completions, strict=True)
    ]
    expected = sequence_logprobs(model, groups, Compute())
    for answers, truth in zip(completions, expected, strict=True):
        found = torch.tensor([sum(answer.logprobs) for answer in answers])
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def test_the_same_seed_draws_the_same_tokens_however_they_are_batched() -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=10, num_samples=2)
    whole = sampler(model).generate(PROMPTS, params, seed=4)
    alone = sampler(model, rows=1).generate(PROMPTS, params, seed=4)
    other = sampler(model).generate(PROMPTS, params, seed=5)
    tokens = [[answer.token_ids for answer in answers] for answers in whole]
    assert tokens == [[answer.token_ids for answer in answers] for answers in alone]
    assert tokens != [[answer.token_ids for answer in answers] for answers in other]
    assert whole[0][0].token_ids != whole[0][1].token_ids
    assert whole[0][0].token_ids != whole[3][0].token_ids


def test_a_prompt_is_computed_once_for_all_its_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    computed = []
    forward = model.model.embed_tokens.forward
    monkeypatch.setattr(
        model.model.embed_tokens,
        "forward",
        lambda ids: (computed.append(ids.numel()), forward(ids))[1],
    )
    prompts = [[1, 5, 9], [1, 7, 30, 31, 32, 33]]
    sampler(model).generate(prompts, SamplingParams(max_new_tokens=4, num_samples=7), seed=1)
    # both prompts; then a token of each of 14 completions, but the last
    assert computed == [3 + 6, 14, 14, 14]


def test_a_completion_ends_with_its_eos_or_at_the_length() -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=20, num_samples=20)
    stops = tuple(range(2, 12))
    answers = sampler(model, eos=stops).generate([[1, 5]], params, seed=0)[0]
    reasons = Counter(answer.finish_reason for answer in answers)
    assert reasons.keys() == {"stop", "length"}
    for answer in answers:
        assert len(answer.token_ids) == len(answer.logprobs)
        ends = [token in stops for token in answer.token_ids]
        if answer.finish_reason == "stop":
            assert ends == [False] * (len(ends) - 1) + [True]
        else:
            assert len(ends) == 20
            assert not any(ends)


def test_draws_follow_the_models_distribution() -> None:
    model = tiny_model("llama", vocab_size=11)
    answers = sampler(model).generate(
        [[1, 5]], SamplingParams(max_new_tokens=1, num_samples=4000), seed=0
    )[0]
    counts = torch.zeros(11)
    for answer in answers:
        counts[answer.token_ids[0]] += 1
    expected = model(torch.tensor([[1, 5]])).logits[0, -1].softmax(-1).detach()
    error = (counts / 4000 - expected).abs()
    assert bool((error < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all())


def test_a_draw_of_many_columns_inverts_their_cumulative_distribution() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2000, 1000)
    logits[:, ::3] = -torch.inf
    logits[:, 700:] = -torch.inf
    uniform = torch.rand(2000, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, logprob = draw(logits, SamplingParams(), uniform)
    truth = logits.double().softmax(-1)
    torch.testing.assert_close(logprob, truth.gather(1, token[:, None])[:, 0].log().float())
    after = truth.cumsum(-1).gather(1, token[:, None])[:, 0]
    before = after - logprob.double().exp()
    assert bool(logprob.isfinite().all())
    assert bool((before - 1e-6 < uniform).all())
    assert bool((uniform < after + 1e-6).all())


def test_temperature_top_k_and_top_p_change_the_distribution_and_its_log_probs() -> None:
    model = tiny_model("llama")
    prompt = [[1, 5]]
    logits = model(torch.tensor(prompt)).logits[0, -1].detach()
    greedy = sampler(model).generate(
        prompt, SamplingParams(max_new_tokens=1, temperature=0), seed=0
    )[0][0]
    assert greedy.token_ids == [int(logits.argmax())]
    assert greedy.logprobs == [0.0]
    top = sampler(model).generate(
        prompt,
        SamplingParams(max_new_tokens=1, temperature=0.5, top_k=3, num_samples=200),
        seed=0,
    )[0]
    best = logits.topk(3).indices.tolist()
    assert {answer.token_ids[0] for answer in top} <= set(best)
    allowed = (logits[best] / 0.5).log_softmax(-1)
    for answer in top:
        expected = float(allowed[best.index(answer.token_ids[0])])
        assert answer.logprobs[0] == pytest.approx(expected, abs=1e-5)
    nucleus = sampler(model).generate(
        prompt, SamplingParams(max_new_tokens=1, top_p=1e-6, num_samples=20), seed=0
    )[0]
    assert {answer.token_ids[0] for answer in nucleus} == {int(logits.argmax())}


def test_the_models_own_generation_settings_are_not_used_and_stay() -> None:
    model = tiny_model("llama")
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_new_tokens = 3
    saved = model.generation_config
    params = SamplingParams(max_new_tokens=9, num_samples=4)
    with_settings = sampler(model).generate([[1, 5]], params, seed=0)
    assert model.generation_config is saved
    plain = sampler(tiny_model("llama")).generate([[1, 5]], params, seed=0)
    assert with_settings == plain


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [([[]], 4, "prompt 0: expected at least one token"), ([[1] * 60], 5, "64 positions")],
)
def test_impossible_prompts_are_refused(prompts: list[list[int]], new: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tiny_model("llama")).generate(prompts, SamplingParams(max_new_tokens=new), seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("num_samples", 0),
        ("num_samples", 10**12),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -1),
    ],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{name}: expected"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
