"""Whole PPO runs: models and where they start, adapters, the watch, evaluation, what is saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fastalign.batch.packed import Group, pack
from fastalign.compute import Compute
from fastalign.data.tokenizer import load_tokenizer, use_distinct_pad
from fastalign.evaluation.rewards import ModelReward
from fastalign.models.load import load_policy, load_reward_model, save_model, save_reward_model
from fastalign.models.reward import score_at, set_pad_token
from fastalign.runs.config import LoraConfig
from fastalign.runs.state import clip_gradient
from fastalign.trainers import (
    ADVANTAGES,
    KL_PENALTIES,
    Cispo,
    Clip,
    ConstantMean,
    Gae,
    Grpo,
    Gspo,
    KLInLoss,
    KLInReward,
    Masked,
    PPOConfig,
    PPOSettings,
    Rloo,
    ValueConfig,
    WatchConfig,
    train_ppo,
)
from fastalign.trainers.ppo import setup
from fastalign.trainers.ppo import train as ppo
from fastalign.trainers.ppo.record import adapted_coefficient
from fastalign.trainers.ppo.setup import ActorCritic, value_source
from fastalign.trainers.sampling.collapse import (
    all_rewards_equal,
    is_repetitive,
    signs_of_collapse,
    watch,
)
from tests.runs.test_resume import assert_same_run
from tests.small_runs import learning_rate_scales, ppo_config, read_metrics, write_rows
from tests.tiny import tiny_model, tiny_reward_model
from tests.tokenizers import make_tokenizer
from tests.trainers.ppo.ppo_cases import experience_of, make_run, plain_config, rollouts_of

LORA = LoraConfig(rank=4, alpha=8.0)


def with_reward_model(folder: Path, *, pad_is_eos: bool = False) -> PPOConfig:
    """Scores from a saved reward model, whose tokenizer may have one token more."""
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder / "llama")
    model = tiny_reward_model("llama", vocab_size=320, seed=4)
    own = make_tokenizer(pad_is_eos=pad_is_eos)
    set_pad_token(model, use_distinct_pad(own, {2}))
    save_reward_model(model, own, folder / "rm/model")
    config = plain_config(folder)
    sources = (config.reward.sources[0], str(folder / "rm/model"))
    return replace(config, reward=replace(config.reward, sources=sources))


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_value_model_starts_as_the_reward_model(folder: Path, pad_is_eos: bool) -> None:
    config = with_reward_model(folder, pad_is_eos=pad_is_eos)
    assert value_source(config) == str(folder / "rm/model")
    run = make_run(config, moved=False)
    assert run.models.value.get_input_embeddings().weight.shape[0] == 320 + pad_is_eos
    tokenizer = load_tokenizer(folder / "llama")
    prompts, texts = ["The menu", "The best"], [" is slow", " camera"]
    reward = ModelReward(folder / "rm/model", Compute())(prompts, texts)
    groups = [
        Group(tokenizer(prompt)["input_ids"], [[*tokenizer(text)["input_ids"][1:], 2]])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    batch = pack(groups)
    last = batch.response_bounds[:, 1] - 1
    value = score_at(run.models.value, batch, last, Compute())
    assert value.tolist() == pytest.approx(reward, rel=1e-4)
    # A step's values are that network's, at the tokens that predict.
    rollouts = rollouts_of(run)
    experience, _ = experience_of(run, rollouts)
    whole = pack(rollouts.groups)
    expected = score_at(run.models.value, whole, whole.predict_index, Compute())
    assert experience.record.value is not None
    torch.testing.assert_close(experience.record.value, expected.detach(), rtol=1e-4, atol=1e-5)
    assert experience.record.value.abs().min() > 0


def test_without_a_reward_model_values_start_at_zero(folder: Path) -> None:
    run = make_run(plain_config(folder), moved=False)
    experience, _ = experience_of(run, rollouts_of(run))
    assert experience.record.value is not None
    assert experience.record.value.tolist() == [0.0] * len(experience.record.logprob)


def test_the_saved_value_model_opens_as_a_reward_model(folder: Path) -> None:
    config = with_reward_model(folder, pad_is_eos=True)
    train_ppo(config)
    start = load_file(folder / "rm/model/model.safetensors")
    after = load_file(folder / "run/value/model.safetensors")
    assert start.keys() == after.keys()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert "score.weight" in changed
    ModelReward(folder / "run/value", Compute())(["The menu"], [" is slow"])
    model = AutoModelForCausalLM.from_pretrained(folder / "run/model")
    before = load_policy(folder / "llama")
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_values_learn_at_their_own_rate(folder: Path) -> None:
    config = plain_config(folder, value={"lr": 5e-3})
    train_ppo(replace(config, train=replace(config.train, max_steps=1)))
    scales = learning_rate_scales(folder / "run/checkpoints/step-000001")
    assert scales == pytest.approx([1.0, 5.0])


def test_the_value_models_gradient_does_not_take_the_policys_step() -> None:
    model = ActorCritic(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for part, size in ((model.policy, 0.5), (model.value, 12.0)):
        part.weight.grad = torch.full((1, 1), size)
    assert clip_gradient(model, 1.0).item() == pytest.approx((0.5**2 + 12.0**2) ** 0.5)
    assert model.policy.weight.grad.item() == 0.5
    assert model.value.weight.grad.item() == pytest.approx(1.0)


def test_a_value_model_that_reads_other_tokens_is_refused(folder: Path) -> None:
    config = with_reward_model(folder)
    model = load_reward_model(folder / "rm/model")
    tokenizer = load_tokenizer(folder / "rm/model")
    file = folder / "rm/model/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (min(vocabulary), max(vocabulary))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the value model .*expected the policy's tokens, but"):
        train_ppo(config)


def test_a_value_path_that_is_no_model_is_named(folder: Path) -> None:
    (folder / "empty").mkdir()
    config = plain_config(folder, value={"path": str(folder / "empty")})
    with pytest.raises(ValueError, match=r"^value\.path: no model can be loaded from"):
        train_ppo(config)


@pytest.mark.parametrize("method", ["gae", "rloo"])
def test_an_adapter_learns_beside_its_base(folder: Path, method: Any) -> None:
    config = plain_config(folder, ppo={"advantage": ADVANTAGES[method](), "epochs": 2})
    config = replace(config, model=replace(config.model, lora=LORA))
    optim = replace(config.optim, lr=1e-2)
    train_ppo(replace(config, optim=optim))
    rows = read_metrics(folder / "run")
    assert rows[0]["objective/kl"] == 0
    assert rows[-1]["objective/kl"] > 0
    base = load_file(folder / "llama/model.safetensors")
    merged = load_file(folder / "run/model/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert (folder / "run/adapter/adapter_model.safetensors").exists()
    assert (folder / "run/value").exists() == (method == "gae")


def test_a_resumed_adapter_equals_a_straight_one(folder: Path) -> None:
    for run, stop in (("straight", None), ("stopped", 3)):
        config = ppo_config(folder, run, stop_at_step=stop)
        config = replace(config, model=replace(config.model, lora=LORA))
        train_ppo(config)
    train = replace(config.train, stop_at_step=None)
    train_ppo(replace(config, run=replace(config.run, resume=True), train=train))
    assert_same_run(folder / "straight", folder / "stopped")


def test_scores_and_coefficient_are_kept_with_the_run(folder: Path) -> None:
    train_ppo(ppo_config(folder, "run", stop_at_step=3))
    kept = json.loads((folder / "run/checkpoints/step-000003/state.json").read_text())["kept"]
    rows = read_metrics(folder / "run")
    coefficient = 0.05
    for row in rows:
        assert row["kl_coefficient"] == coefficient
        error = min(max(row["objective/kl"] / 1.0 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 8 / 100
    assert kept["kl_coefficient"] == coefficient != 0.05
    for row in rows:
        scaled = (row["reward"] - kept["score_mean"]) / kept["score_std"]
        expected = scaled - 0.5 * row["completions/clipped_ratio"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)


def test_the_coefficient_adapts_by_a_clipped_error() -> None:
    config = KLInReward(target=6.0, horizon=10000)
    assert adapted_coefficient(0.15, 12.0, config, 512) == 0.15 * (1 + 0.2 * 512 / 10000)
    assert adapted_coefficient(0.15, 6.6, config, 512) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    assert adapted_coefficient(0.15, 0.0, config, 512) == 0.15 * (1 - 0.2 * 512 / 10000)
    assert adapted_coefficient(0.15, 12.0, KLInReward(), 512) == 0.15


def test_the_reference_may_be_another_model_and_must_stay_the_same(folder: Path) -> None:
    other = tiny_model("llama", vocab_size=320, seed=9)
    save_model(other, make_tokenizer(), folder / "other")
    config = plain_config(folder, reference={"path": str(folder / "other")})
    train_ppo(replace(config, train=replace(config.train, stop_at_step=1)))
    assert read_metrics(folder / "run")[0]["objective/kl"] > 1
    other.lm_head.weight.data[0, 0] += 1
    save_model(other, make_tokenizer(), folder / "other")
    with pytest.raises(ValueError, match="the frozen reference is not what"):
        train_ppo(replace(config, run=replace(config.run, resume=True)))


@pytest.mark.parametrize("method", ["gae", "rloo", "grpo"])
def test_the_reward_rises(folder: Path, method: Any) -> None:
    config = plain_config(
        folder,
        ppo={"advantage": ADVANTAGES[method](), "epochs": 4},
        sampling={"num_samples": 12},
        reward={"normalise": True},
        optim={"lr": 5e-3, "schedule": "constant"},
        train={"max_steps": 24, "eval_every": 8, "batch_size": 13},
    )
    train_ppo(config)
    rows = read_metrics(folder / "run")
    # 624 samples against 156, with a standard deviation of 4 (a standard error of 0.4).
    assert sum(row["reward"] for row in rows[-4:]) / 4 > rows[0]["reward"] + 2
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.5
    assert [row["step"] for row in rows if "eval_reward" in row] == [8, 16, 24]
    assert rows[-1]["eval_reward"] > rows[0]["reward"] + 2
    assert rows[-1]["eval_objective/kl"] > 0
    assert 0 < rows[-1]["eval_completions/mean_length"] <= 7
    assert rows[-1]["episode"] == 24 * 156
    assert rows[-1]["lr"] == rows[-1]["learning_rate"] == 5e-3


def test_without_a_learning_rate_nothing_drifts_and_each_step_samples_anew(folder: Path) -> None:
    source = str(write_rows(folder / "one.jsonl", [{"prompt": "The menu"}]))
    train_ppo(plain_config(folder, data={"train": source}, optim={"lr": 0.0}))
    rows = read_metrics(folder / "run")
    assert [row["objective/kl"] for row in rows] == [0] * 8
    assert len({row["objective/entropy"] for row in rows}) == 8
    assert max(abs(row["val/ratio"] - 1) for row in rows) < 1e-5


@pytest.mark.parametrize(
    ("estimator", "place", "said"),
    [("k1", "reward", False), ("k3", "reward", True), ("k3", "loss", False)],
)
def test_a_penalty_without_the_kls_gradient_is_said(
    folder: Path, estimator: str, place: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.advise_on_estimator(plain_config(folder, kl=KL_PENALTIES[place](estimator=estimator)))
    assert (
        "kl.estimator=k3 in the reward gives a biased KL gradient" in capsys.readouterr().out
    ) == said


def test_scores_far_beyond_a_values_steps_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = plain_config(folder)
    scores = torch.tensor([0.0, 8.0])
    setup.advise_on_scale(config, scores)
    assert "standard deviation of 4, and a value moves by at most 0.2" in capsys.readouterr().out
    setup.advise_on_scale(config, scores / 4)
    setup.advise_on_scale(plain_config(folder, ppo={"advantage": Rloo()}), scores)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_bf16_and_gradient_checkpointing(folder: Path, packing: Any) -> None:
    config = plain_config(folder)
    found = []
    for run, options in (("exact", {}), ("low", {"precision": "bf16"})):
        train = replace(
            config.train, max_steps=1, packing=packing, gradient_checkpointing=bool(options)
        )
        changed = replace(config.run, dir=str(folder / run))
        train_ppo(replace(config, run=changed, train=replace(train, **options)))
        found.append(read_metrics(folder / run)[0])
    assert found[1]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert found[1]["val/ratio"] == pytest.approx(1, abs=0.02)
    assert found[1]["entropy"] == pytest.approx(found[0]["entropy"], rel=0.1)
    assert found[1]["entropy"] != found[0]["entropy"]


CALM = {
    "entropy": 2.0,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.3,
    "completions/repeated_ratio": 0.1,
    "objective/kl": 4.0,
}


@pytest.mark.parametrize(
    ("name", "value", "sign"),
    [
        ("entropy", 0.01, "entropy 0.01 below 0.05"),
        ("completions/mean_length", 1.0, "mean length 1 below 1.5"),
        ("completions/clipped_ratio", 0.99, "share without an end 0.99 above 0.95"),
        ("completions/repeated_ratio", 0.8, "share of repeated text 0.8 above 0.5"),
        ("objective/kl", 120.0, "KL 120 above 100"),
    ],
)
def test_each_limit_has_its_sign(name: str, value: float, sign: str) -> None:
    assert signs_of_collapse(CALM, WatchConfig()) == []
    assert signs_of_collapse({**CALM, name: value}, WatchConfig()) == [sign]


def test_a_collapse_is_counted_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, float] = {}
    collapsed = {**CALM, "entropy": 0.0}
    states = [CALM, collapsed, collapsed, CALM, collapsed]
    counts = [watch(metrics, WatchConfig(), kept)["collapsed"] for metrics in states]
    assert counts == [0, 1, 2, 0, 1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "the policy looks collapsed",
        "the policy no longer looks collapsed",
        "the policy looks collapsed",
    ]


def test_repeats_are_of_runs_of_four_tokens() -> None:
    assert not is_repetitive(list(range(20)))
    assert not is_repetitive([1, 1, 1, 1, 1])  # two runs: too short to tell
    assert is_repetitive([1, 1, 1, 1, 1, 1])
    assert is_repetitive([1, 2, 3] * 4)  # nine runs, three distinct
    assert not is_repetitive([1, 2, 3, 4, 5, 6] * 2)  # nine runs, six distinct


def test_a_collapsed_run_is_ended_early_and_can_go_on(folder: Path) -> None:
    config = plain_config(folder, watch={"stop": True, "patience": 2, "min_entropy": 50.0})
    result = train_ppo(config)
    assert (result.step, result.finished, result.exit_code) == (2, False, 3)
    assert [row["collapsed"] for row in read_metrics(folder / "run")] == [1, 2]
    assert not (folder / "run/model").exists()
    again = replace(
        config, run=replace(config.run, resume=True), watch=replace(config.watch, stop=False)
    )
    result = train_ppo(again)
    assert (result.step, result.finished, result.exit_code) == (8, True, 0)
    assert read_metrics(folder / "run")[-1]["collapsed"] == 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampling": {"top_p": 0.9}}, r"sampling: expected samples of the policy itself"),
        ({"sampling": {"temperature": 0.0}}, r"sampling: expected samples of the policy itself"),
        (
            {"ppo": {"advantage": Rloo()}, "sampling": {"num_samples": 1}},
            r"sampling\.num_samples: expected at least 2 under --ppo\.advantage rloo, got 1",
        ),
        ({"ppo": {"mini_batches": 5}}, r"ppo\.mini_batches: expected at most .* \(4 prompts\)"),
        ({"ppo": {"ptx_coefficient": 2.0}}, r"ppo\.ptx_coefficient: 2.0 is a setting of ppo\.ptx"),
        (
            {"ppo": {"advantage": Grpo()}, "kl": {"estimator": "full"}},
            r"kl: expected loss for the exact KL under --ppo\.advantage grpo",
        ),
        ({"kl": {"horizon": 5}}, r"kl\.horizon: 5 is a setting of kl\.target"),
        ({"kl": {"target": 1.0, "coefficient": 0.0}}, r"kl\.coefficient: expected more than 0"),
        ({"value": {"clip_range": 0.0}}, r"value\.clip_range: expected a finite number above 0"),
        ({"watch": {"max_repeated": 1.5}}, r"watch\.max_repeated: .* at most 1, got 1\.5"),
        ({"optim": {"lr": 0.0}, "value": {"lr": 1e-3}}, r"optim\.lr: expected more than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    folder: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plain_config(folder, **sections)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLInLoss(estimator="k1"), r"kl\.estimator: expected k2, k3 or full .*, got k1"),
        (lambda: Gae(gae_lambda=1.5), r"ppo\.advantage\.gae_lambda: .* at most 1, got 1\.5"),
        (lambda: Gae(gamma=-0.1), r"ppo\.advantage\.gamma: expected a finite number of at least 0"),
        (lambda: PPOSettings(advantage="rloo"), r"ppo\.advantage: expected Gae.* got 'rloo'"),
        (lambda: Rloo(whiten="rewards"), r"ppo\.advantage\.whiten: expected none or advantages"),
        (lambda: Clip(1.0), r"ppo\.loss\.clip_range: expected a number in \(0, 1\), got 1"),
        (lambda: Clip(dual_clip=1.0), r"ppo\.loss\.dual_clip: expected more than 1, got 1"),
        (lambda: Gspo(clip_range_high=0.0), r"ppo\.loss\.clip_range_high: .* above 0, got 0"),
        (lambda: Cispo(2.0, 2.0), r"ppo\.loss\.min_ratio: .* below ppo.loss.max_ratio \(2.0\)"),
        (lambda: ConstantMean(0), r"ppo\.mean\.length: expected a finite number above 0, got 0"),
        (lambda: Masked(1.0, 1.5), r"ppo\.importance\.min_weight: .* below 1.0 .* got 1.5"),
        (lambda: PPOSettings(loss="gspo"), r"ppo\.loss: expected Clip.* got 'gspo'"),
        (lambda: PPOSettings(mean="tokens"), r"ppo\.mean: expected TokenMean.* got 'tokens'"),
        (lambda: PPOSettings(importance=2.0), r"ppo\.importance: expected Unweighted.* got 2"),
        (lambda: KLInLoss(0.1, "full", by_ratio=True), r"kl\.by_ratio: expected k2 or k3"),
    ],
)
def test_a_choice_has_its_own_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_setting_of_the_value_model_needs_one(folder: Path) -> None:
    config = ppo_config(folder, "run")
    with pytest.raises(ValueError, match=r"value\.lr: a setting of a value model, which"):
        replace(config, ppo=PPOSettings(advantage=Rloo()), value=ValueConfig(lr=1e-3))


def test_the_exact_kl_needs_a_head_without_an_adapter(folder: Path) -> None:
    config = plain_config(folder, kl={"estimator": "full"})
    lora = replace(LORA, targets=("all-linear", "lm_head"))
    with pytest.raises(ValueError, match=r"kl\.estimator: expected k1, k2 or k3 with an adapter"):
        train_ppo(replace(config, model=replace(config.model, lora=lora)))


@pytest.mark.parametrize("advantage", [Gae(), Grpo()], ids=["gae", "grpo"])
def test_rewards_that_are_all_equal_are_counted_and_said_once(
    folder: Path, advantage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ppo_config(folder, "run", max_steps=3)
    (folder / "words.json").write_text(json.dumps({"bias": 0.0, "weights": {}}))
    reward = replace(config.reward, normalise=False)
    settings = replace(config.ppo, advantage=advantage)
    train_ppo(replace(config, reward=reward, ppo=settings))
    out = capsys.readouterr().out
    assert out.count("completions are equal; such a step has no learning signal") == 1
    assert "step 1: the rewards of all" in out
    assert "3 of 3 steps had no learning signal" in out
    assert [row["num_steps_without_signal"] for row in read_metrics(folder / "run")] == [1, 2, 3]


def test_rewards_are_compared_where_they_order_samples() -> None:
    rewards = torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert all_rewards_equal(rewards, 2)
    assert not all_rewards_equal(rewards, 1)
    assert not all_rewards_equal(torch.tensor([1.0, 1.0, 2.0, 3.0]), 2)
    assert all_rewards_equal(torch.ones(4), 1)
    assert not all_rewards_equal(torch.ones(1), 1)  # nothing to compare with


def test_an_error_between_two_updates_saves_nothing_of_their_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ppo(ppo_config(folder, "straight", max_steps=3))
    plain, calls = ppo.one_update, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second of four updates of step 2
            raise KeyError("in an update")
        return plain(*arguments)

    monkeypatch.setattr(ppo, "one_update", fails)
    said = r"amid the updates of step 2; step 1 is saved, go on with --run\.resume"
    with pytest.raises(KeyError, match=said):
        train_ppo(ppo_config(folder, "run", max_steps=3, save_every=1))
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step-000001"]
    train_ppo(ppo_config(folder, "run", max_steps=3, save_every=1, resume=True))
    losses = [[row["loss"] for row in read_metrics(folder / run)] for run in ("straight", "run")]
    assert losses[0] == losses[1]
