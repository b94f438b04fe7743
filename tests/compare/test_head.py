"""The head that learns while people label: its fit, its choice, and its honest accuracy."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastalign.compare.features import PairFeatures, pair_features, principal_directions
from fastalign.compare.head import (
    LEAST_LABELS,
    Labels,
    committee,
    fit_all,
    fit_head,
    fit_heads,
    folds_of,
    held_out_accuracy,
    held_out_outcomes,
    informative,
    labels_of,
    log_likelihood,
    ranking,
)
from fastalign.compare.labelling import Choice, Labelling
from fastalign.compare.learner import Learner
from fastalign.compare.store import NewPair, NewVote, Store
from fastalign.compute import Compute
from fastalign.evaluation.rewards import ModelReward
from fastalign.losses.reward import rao_kupper_outcomes, rao_kupper_votes
from fastalign.models.load import load_reward_model, save_model, save_reward_model
from fastalign.models.lora import merge_adapter
from fastalign.models.lora_files import save_adapter
from tests.compare.site import new_store
from tests.small_runs import sentence
from tests.tiny import put_adapter, tiny_model, tiny_reward_model
from tests.tokenizers import make_tokenizer

NU = 2.0


def made_features(number: int = 400, dimensions: int = 12, *, per_prompt: int = 2) -> PairFeatures:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(number, dimensions, generator=generator, dtype=torch.float64)
    x = x / math.sqrt(dimensions)
    ids = tuple(range(1, number + 1))
    prompts = tuple(n // per_prompt for n in range(number))
    return PairFeatures(ids, prompts, x, torch.zeros(number, dtype=torch.float64), None, ())


def true_difference(features: PairFeatures) -> Tensor:
    weight = torch.randn(
        features.difference.shape[1],
        generator=torch.Generator().manual_seed(4),
        dtype=torch.float64,
    )
    return 3.0 * features.difference @ weight


def made_labels(features: PairFeatures, places: Tensor, seed: int = 5) -> Labels:
    outcomes = rao_kupper_outcomes(true_difference(features)[places], nu=NU).exp()
    drawn = torch.multinomial(outcomes, 1, generator=torch.Generator().manual_seed(seed))
    votes = torch.nn.functional.one_hot(drawn[:, 0], 3).double()
    return Labels(places, votes, torch.ones(len(places), dtype=torch.bool))


def test_the_fit_is_the_maximum_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    features = replace(made_features(60, 4), reward=torch.linspace(-1, 1, 60, dtype=torch.float64))
    labels = made_labels(features, torch.arange(60))
    anchor = torch.full((4,), 0.3, dtype=torch.float64)
    taus, ones = (
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.ones(2, 60, dtype=torch.float64),
    )
    monkeypatch.setattr("fastalign.compare.head.GRADIENT_TOLERANCE", 1e-6)
    head = fit_heads(features, labels, taus, torch.stack([-anchor, anchor]), ones)[1]
    start = math.log(1.5 - 1.0)

    def negative_log_posterior(weight: Tensor, scale: Tensor, nu: Tensor) -> Tensor:
        difference = features.difference @ weight + scale * features.reward
        loss = rao_kupper_votes(difference, labels.votes, nu=nu).sum()
        prior = ((weight - anchor) / 2.0).square().sum() + (scale - 1).square()
        return loss + (prior + ((nu - 1).log() - start).square()) / 2

    at = [v.clone().requires_grad_() for v in (head.weight, head.scale, head.nu)]
    gradients = torch.autograd.grad(negative_log_posterior(*at), at)
    assert max(g.abs().max().item() for g in gradients) < 1e-3
    moved = [v.detach() + 0.1 for v in at]
    assert negative_log_posterior(*moved) > negative_log_posterior(*at) + 0.01


def test_a_head_learns_ties_and_order() -> None:
    features = made_features()
    labels = made_labels(features, torch.arange(400))
    head = fit_head(features, labels, tau=3.0)
    truth = true_difference(features)
    found = head.difference(features)
    assert torch.corrcoef(torch.stack([truth, found]))[0, 1] > 0.9
    assert 1.6 < head.nu.item() < 2.5


def test_weights_of_labels_are_repetitions() -> None:
    features = made_features(30, 3)
    labels = made_labels(features, torch.arange(30))
    weights = torch.tensor([2.0, 0.0, 1.0] * 10, dtype=torch.float64)
    repeated = torch.repeat_interleave(torch.arange(30), weights.long())
    one, zeros = torch.ones(1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    (once,) = fit_heads(features, labels, one, zeros, weights[None])
    again = fit_head(features, labels.at(repeated), tau=1.0)
    torch.testing.assert_close(once.weight, again.weight, atol=1e-6, rtol=1e-6)


def test_held_out_outcomes_have_not_seen_their_label() -> None:
    features = made_features(100, 60)  # nearly as many weights as labels: they fit by heart
    labels = made_labels(features, torch.arange(100))
    folds = folds_of(features, labels)
    assert torch.equal(folds[0::2], folds[1::2])  # a prompt's pairs are together
    (held_out,) = held_out_outcomes(features, labels, [(10.0, 1.0)])
    changed = labels.votes.clone()
    fold = folds == folds[0]
    changed[fold] = changed[fold][:, [1, 0, 2]]
    changed_labels = Labels(labels.places, changed, labels.random)
    (other,) = held_out_outcomes(features, changed_labels, [(10.0, 1.0)])
    torch.testing.assert_close(held_out[fold], other[fold], atol=0.01, rtol=0.01)
    assert (held_out[~fold] - other[~fold]).abs().mean() > 0.5
    seen = fit_head(features, labels, tau=10.0).outcomes(features)
    assert log_likelihood(seen, labels).mean() > log_likelihood(held_out, labels).mean() + 0.5


def test_accuracy_is_of_pairs_drawn_at_random_alone() -> None:
    features = made_features(6, 2, per_prompt=1)
    votes = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0], [2, 1, 0]])
    random = torch.tensor([True, True, False, True, True, True])
    labels = Labels(torch.arange(6), votes.double(), random)
    difference = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    outcomes = rao_kupper_outcomes(difference, nu=NU)
    found = held_out_accuracy(features, outcomes, labels)
    # Right on the first and the last, wrong on the second; the model chose the third; two are ties.
    assert (found["accuracy"], found["accuracy_count"]) == (pytest.approx(2 / 3), 3)


def test_what_is_unknown_is_asked_first() -> None:
    features = made_features(200, 2, per_prompt=1)
    x = features.difference.clone()
    x[:100, 1] = 0.0  # known pairs: the labels are all along the first direction
    x[100:, 0] = 0.0
    features = replace(features, difference=x)
    labels = made_labels(features, torch.arange(100))
    score = informative(features, committee(features, labels, 3.0, seed=0))
    assert score.shape == (200,)
    assert (score >= 0).all()
    assert score[100:].mean() > 3 * score[:100].mean()


def test_a_committee_without_labels_differs_by_its_anchors() -> None:
    features = made_features(50, 4)
    score = informative(features, committee(features, labels_of(features, {}), 1.0, seed=0))
    assert (score > 0).all()


def test_the_order_is_spread_over_prompts() -> None:
    features = made_features(6, 2, per_prompt=3)
    score = torch.tensor([9.0, 8.0, 7.0, 5.0, 1.0, 0.5], dtype=torch.float64)
    assert ranking(features, score, []) == [1, 4, 2, 3, 5, 6]
    # The first prompt has one labelled pair, so its best one counts half.
    assert ranking(features, score, [1]) == [4, 2, 3, 5, 6]


def test_more_labels_are_needed_the_less_is_known() -> None:
    features = made_features(1200, 30)
    few = fit_all(features, made_labels(features, torch.arange(200))).measures
    many = fit_all(features, made_labels(features, torch.arange(1200))).measures
    # Of 32 parameters: (32 / 2) / 0.01 = 1,600 labels, by the asymptotic b.
    assert 500 < few["labels_needed"] < 2500
    assert many["labels_needed"] < few["labels_needed"] / 2
    assert many["accuracy_low"] < many["accuracy"] < many["accuracy_high"]
    assert fit_all(
        features, made_labels(features, torch.arange(LEAST_LABELS - 1))
    ).measures.keys() == {*("num_labels", "tau", "nu", "seconds")}


def test_directions_keep_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    mixed = low @ torch.randn(5, 40, generator=generator, dtype=torch.float64)
    found = principal_directions(mixed, 5)
    assert found.shape == (80, 5)
    scaled = mixed / mixed.square().mean(0).sqrt()
    expected = scaled @ scaled.T
    torch.testing.assert_close(
        found @ found.T / (found @ found.T).trace(), expected / expected.trace()
    )
    assert found.square().sum(1).mean().item() == pytest.approx(1.0)


def text_pairs(number: int) -> list[NewPair]:
    return [
        NewPair(
            "The" + sentence(n // 2, 2),
            sentence(n + 20, 1 + n % 4),
            sentence(n + 41, 2 + n % 3),
            "f",
        )
        for n in range(number)
    ]


def test_features_are_those_of_the_reward_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    long = NewPair("The", " good" * 70, " bad", "f")  # of a model with 64 positions
    store.add_pairs([*text_pairs(8), long])
    model = tiny_reward_model("llama", vocab_size=320)
    save_reward_model(model, make_tokenizer(), tmp_path / "reward")
    features = pair_features(str(tmp_path / "reward"), store.pairs(), Compute())
    assert features.unread == (9,)
    assert features.ids == tuple(range(1, 9))
    assert features.prompts == (0, 0, 1, 1, 2, 2, 3, 3)
    reward = ModelReward(tmp_path / "reward", Compute(), raw=True)
    pairs = store.pairs()[:8]
    first = reward([p.prompt for p in pairs], [p.response_a for p in pairs])
    second = reward([p.prompt for p in pairs], [p.response_b for p in pairs])
    expected = torch.tensor(first).double() - torch.tensor(second).double()
    torch.testing.assert_close(features.reward, expected, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_a_reward_model_s_adapter(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    store.add_pairs(text_pairs(8))
    save_model(tiny_model("llama", vocab_size=320), make_tokenizer(), tmp_path / "base")
    model, tokenizer = put_adapter(load_reward_model(tmp_path / "base")), make_tokenizer()
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_reward_model(model, tokenizer, tmp_path / "whole")
    found, expected = (
        pair_features(str(tmp_path / each), store.pairs(), Compute()).reward
        for each in ("adapter", "whole")
    )
    assert expected.abs().min() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_causal_model_has_features_without_a_reward(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    store.add_pairs(text_pairs(4))
    save_model(tiny_model("llama", vocab_size=320), make_tokenizer(), tmp_path / "causal")
    features = pair_features(str(tmp_path / "causal"), store.pairs(), Compute())
    assert features.reward.tolist() == [0.0] * 4
    assert features.difference.abs().min(1).values.max() > 0


def test_the_learner_fits_while_people_label(tmp_path: Path) -> None:
    store = new_store(tmp_path, 40)
    person = store.annotator("anna").id
    labelling = Labelling(
        store, [store.annotator("anna")], Choice(repeat_share=0.0, random_share=0.5)
    )
    features = replace(made_features(40, 3), ids=tuple(labelling.pairs))

    def verdict() -> None:
        shown = labelling.shown(person)
        assert shown
        side = "a" if true_difference(features)[shown.pair - 1] > 0 else "b"
        vote = NewVote(shown.pair, person, shown.left, side, shown.chosen_by, shown.nonce)  # type: ignore[arg-type]
        assert labelling.vote(vote)

    async def label(learner: Learner) -> None:
        for _ in range(30):
            verdict()
            learner.heard()
            if learner._running is not None:
                await learner._running
                await asyncio.sleep(0)  # its callback runs before the next verdict

    with ThreadPoolExecutor(1) as executor:
        learner = Learner(store, labelling, features, 10, executor)
        learner.fit()
        assert learner.words() == []
        asyncio.run(label(learner))
    assert [fit["num_labels"] for fit in store.fits()] == [0, 10, 20, 30]
    chosen = [vote.chosen_by for vote in labelling.votes()]
    assert 5 < chosen.count("model") < 25
    words = dict(learner.words())
    count = store.fits()[-1]["accuracy_count"]
    assert count == sum(by == "random" for by in chosen)
    assert f"of {count})" in words["reward model, held-out accuracy"]
