"""KTO: its data, mismatched answers, gradients beside plain torch, runs, resumes, adapters."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.cli.main import main
from fastalign.data.load import load_examples
from fastalign.data.tokenizer import load_tokenizer
from fastalign.losses import kto, kto_kl
from fastalign.models.load import load_policy
from fastalign.runs.config import LoraConfig, RunConfig, TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import KTOConfig, KTOLoss, UnpairedDataConfig, train_kto
from fastalign.trainers.dpo.reference import load_reference
from fastalign.trainers.kto import train as kto_train
from tests.runs.test_resume import assert_same_run
from tests.small_runs import dpo_config, read_metrics, sentence, write_rows
from tests.tokenizers import make_tokenizer
from tests.trainers.dpo.step_cases import PACKINGS, gradients

INDICES = [3, 1, 4, 5, 9, 2, 6]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": "The" + sentence(n, 1 + n % 3),
            "completion": sentence(n + 20, 1 + n % 4),
            "label": n % 3 != 1,
        }
        for n in range(12)
    ]


def kto_config(folder: Path, run: str, **train: Any) -> KTOConfig:
    source = str(write_rows(folder / "thumbs.jsonl", rows()))
    of_dpo = dpo_config(folder, run)
    return KTOConfig(
        model=of_dpo.model,
        data=UnpairedDataConfig(train=source, eval=source),
        run=RunConfig(dir=str(folder / run), resume=train.pop("resume", False)),
        loss=KTOLoss(beta=0.5, desirable_weight=1.3, undesirable_weight=0.8),
        reference=of_dpo.reference,
        optim=of_dpo.optim,
        train=replace(of_dpo.train, **train),
    )


def load(folder: Path, text: Sequence[dict[str, Any]], **options: Any) -> Any:
    source = write_rows(folder / "rows.jsonl", list(text))
    return load_examples(source, "unpaired", make_tokenizer(), max_length=64, **options)


def test_rows_with_labels(folder: Path) -> None:
    data = load(folder, rows())
    assert data.labels == [row["label"] for row in rows()]
    assert all(len(group.response_ids) == 1 for group in data.groups)
    assert data.report.forms == {
        "prompt + completion, label true, plain text": 8,
        "prompt + completion, label false, plain text": 4,
    }
    changed = [{**rows()[0], "label": False}, *rows()[1:]]
    assert load(folder, changed).fingerprint != data.fingerprint


def test_comparisons_are_two_answers_each(folder: Path) -> None:
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tie = {"prompt": "a", "response_a": "b", "response_b": "c", "label": "tie"}
    data = load(folder, [*pairs, tie], ties="drop")
    compared = load_examples(folder / "pairs.jsonl", "preference", make_tokenizer(), max_length=64)
    assert data.labels == [True, False] * 12
    for number, group in enumerate(compared.groups):
        for side in (0, 1):
            found = data.groups[2 * number + side]
            assert found == Group(group.prompt_ids, [group.response_ids[side]])
    report = data.report
    assert (report.num_used, report.num_pairs_split, report.num_ties_dropped) == (12, 12, 1)
    assert "12 comparisons are 24 examples, a good and a bad answer each" in str(report.lines())
    with pytest.raises(ValueError, match=r"rows.jsonl:13: column 'label': a tie is neither good"):
        load(folder, [*pairs, tie])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "column 'label': missing; unpaired rows have prompt"),
        ({"prompt": "a", "completion": "b", "label": None}, "expected true or false, got null"),
        (
            {"prompt": "a", "completion": "b", "label": 1},
            "expected true or false, got the number 1",
        ),
        ({"prompt": "a", "completion": "b", "label": "up"}, "expected true or false, got 'up'"),
        ({"prompt": "a", "label": True}, "column 'completion': missing"),
        ({"completion": "a", "label": True}, "column 'prompt': missing"),
        ({"prompt": "a", "completion": "", "label": True}, "column 'completion'"),
    ],
)
def test_a_faulty_row_is_named(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:2") as caught:
        load(folder, [rows()[0], row])
    assert message in str(caught.value)


def test_data_check_knows_the_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "rows.jsonl"
    write_rows(file, [*rows(), {"prompt": "a", "completion": "b", "label": "up"}])
    assert main(["data", "check", str(file), "--tokenizer", str(folder / "llama")]) == 2
    text = capsys.readouterr()
    assert "rows.jsonl:13: column 'label': expected true or false, got 'up'" in text.err
    assert "8 x prompt + completion, label true, plain text" in text.out
    assert "  good     '" in text.out
    table = folder / "rows.csv"
    table.write_text("prompt,completion,label\na,b c,True\nd,e f,0\n")
    assert main(["data", "check", str(table)]) == 0
    out = capsys.readouterr().out
    assert "1 x prompt + completion, label true" in out
    assert "1 x prompt + completion, label false" in out


def test_mismatched_answers_are_of_other_prompts() -> None:
    prompts = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    groups = [Group([10 + prompt], [[20 + n]]) for n, prompt in enumerate(prompts)]
    found = kto_train.partners(groups, seed=3)
    assert all(prompts[other] != prompts[own] for own, other in enumerate(found))
    assert len(set(found)) > 4
    assert found == kto_train.partners(groups, seed=3)
    assert found != kto_train.partners(groups, seed=4)
    same = [Group([1], [[20 + n]]) for n in range(4)]
    alike = kto_train.partners(same, seed=0)
    assert sorted(alike) == [0, 1, 2, 3]
    assert all(own != other for own, other in enumerate(alike))


def test_a_mismatched_answer_is_no_longer_than_every_row_is(folder: Path) -> None:
    data = load(folder, [*rows(), {"prompt": "The " * 30, "completion": " a", "label": True}])
    longest = max(len(g.prompt_ids) + len(g.response_ids[0]) for g in data.groups)
    both = kto_train.with_mismatched(data.groups, 0)
    of = kto_train.partners(data.groups, 0)
    cut = 0
    for index, group in enumerate(both):
        own, other = group.response_ids
        assert (group.prompt_ids, own) == (
            data.groups[index].prompt_ids,
            data.groups[index].response_ids[0],
        )
        whole = data.groups[of[index]].response_ids[0]
        assert other == whole[: len(other)]
        assert len(group.prompt_ids) + len(other) <= longest
        cut += other != whole
    assert cut >= 1


def step_of(folder: Path, **train: Any) -> tuple[Tensor, float, dict[str, Tensor], dict[str, Any]]:
    """The KL, loss, gradient and metrics of a step of a policy that has left its reference."""
    config = kto_config(folder, "unused")
    compute = make_compute(TrainConfig(device="cpu", **train))
    policy, tokenizer = load_policy(folder / "llama", compute), load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    reference = load_reference(config, policy, tokenizer, compute)
    answers = kto_train.make_answers(config, data, range(12), reference, compute)
    move(policy)
    kl = kto_train.estimate_kl(policy, answers, INDICES, compute)
    total = kto_train.kto_gradient(policy, config.loss, answers, kl, INDICES, compute)
    return kl, total.loss, gradients(policy), total.metrics()


def move(policy: Any) -> None:
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))


def eager_step(folder: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same by single forwards in float64 and the formulas."""
    config, tokenizer = kto_config(folder, "unused"), load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    policy, reference = (load_policy(folder / "llama") for _ in range(2))
    move(policy)
    of = kto_train.partners(data.groups, config.run.seed)

    def logprob(model: Any, index: int, answer: int) -> Tensor:
        prompt, ids = data.groups[index].prompt_ids, data.groups[answer].response_ids[0]
        longest = max(len(g.prompt_ids) + len(g.response_ids[0]) for g in data.groups)
        ids = ids[: longest - len(prompt)]
        log_p = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return log_p.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()

    own, mismatched = (
        [
            torch.stack([logprob(model, i, pick(i)) for i in INDICES])
            for model in (policy, reference)
        ]
        for pick in (lambda i: i, lambda i: of[i])
    )
    kl = kto_kl(*mismatched)
    labels = torch.tensor([data.labels[i] for i in INDICES])
    losses = kto(own[0], own[1], labels, kl, beta=0.5, desirable_weight=1.3, undesirable_weight=0.8)
    losses.mean().backward()
    return kl, losses.mean(), gradients(policy)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [30, 4096])
def test_a_steps_gradient_is_that_of_plain_torch(folder: Path, packing: str, tokens: int) -> None:
    kl, loss, found, metrics = step_of(folder, packing=packing, tokens_per_batch=tokens)
    true_kl, expected, eager = eager_step(folder)
    assert true_kl > 0.01
    assert kl.item() == pytest.approx(true_kl.item(), rel=1e-4)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, value in eager.items():
        size = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * size)
    assert (metrics["num_desirable"], metrics["num_undesirable"]) == (5, 2)
    assert (metrics["num_micro_batches"] > 1) == (tokens == 30)


def test_a_stopped_and_resumed_run_equals_a_straight_one(folder: Path) -> None:
    train_kto(kto_config(folder, "straight", eval_every=4))
    train_kto(kto_config(folder, "stopped", eval_every=4, stop_at_step=3))
    train_kto(kto_config(folder, "stopped", eval_every=4, resume=True))
    assert_same_run(folder / "straight", folder / "stopped")
    all_rows = read_metrics(folder / "straight")
    steps = [row for row in all_rows if "loss" in row]
    assert steps[0]["kl"] == 0.0
    assert steps[0]["loss"] == pytest.approx(first_loss(steps[0]), abs=1e-5)
    assert steps[-1]["rewards/margins"] > 0.1
    evaluations = [row for row in all_rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert evaluations[1]["eval_rewards/margins"] > evaluations[0]["eval_rewards/margins"]
    assert evaluations[1]["eval_kl"] >= 0


def first_loss(row: dict[str, Any]) -> float:
    """Of a policy that is its reference: half of each answer's weight."""
    good, bad = row["num_desirable"], row["num_undesirable"]
    return float((1.3 * good + 0.8 * bad) / 2 / (good + bad))


def test_an_adapters_reference_is_its_base(folder: Path) -> None:
    config = kto_config(folder, "run", max_steps=4)
    config = replace(config, model=replace(config.model, lora=LoraConfig(rank=4, alpha=8.0)))
    train_kto(replace(config, optim=replace(config.optim, lr=1e-2)))
    steps = [row for row in read_metrics(folder / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(first_loss(steps[0]), abs=1e-5)
    assert steps[-1]["rewards/margins"] > 0.05
    assert (folder / "run/adapter/adapter_model.safetensors").exists()


def test_the_command_and_its_advice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "thumbs.jsonl", rows())
    flags = [
        *("kto", "--model.path", str(folder / "llama"), "--train.device", "cpu"),
        *("--data.train", str(folder / "thumbs.jsonl"), "--train.max-steps", "2"),
        *("--train.batch-size", "4", "--reference.cache-dir", str(folder / "cache")),
    ]
    assert main([*flags, "--run.dir", str(folder / "one")]) == 0
    text = capsys.readouterr().out
    advice = "8 good and 4 bad answers weigh 2 to 1; the paper keeps this between 1 and 1.33: "
    assert f"{advice}--loss.desirable-weight 0.5 to 0.667" in text
    weighted = [*flags, "--loss.desirable-weight", "0.6", "--run.dir", str(folder / "two")]
    assert main(weighted) == 0
    assert "the paper keeps" not in capsys.readouterr().out
    pairs = [
        *flags,
        "--data.train",
        str(folder / "pairs.jsonl"),
        "--run.dir",
        str(folder / "three"),
    ]
    assert main(pairs) == 0
    assert "12 comparisons are 24 examples" in capsys.readouterr().out
    write_rows(folder / "thumbs.jsonl", rows()[:1])
    assert main([*flags, "--run.dir", str(folder / "four")]) == 2
    assert "expected at least 2 answers" in capsys.readouterr().err


def test_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss\.beta: expected a finite number above 0, got 0"):
        KTOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"loss\.undesirable_weight: .* above 0, got -1"):
        KTOLoss(undesirable_weight=-1.0)
