"""`fastalign sft` with a teacher: a gradient beside plain torch, runs, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastalign
from fastalign.cli.main import main
from fastalign.data.tokenizer import load_tokenizer
from fastalign.estimate.run import estimate_run
from fastalign.models.load import load_policy, save_model
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import JSDLoss, SFTConfig, SFTLoss, TeacherConfig, sft, train_sft
from tests.small_runs import read_metrics, sft_config, taught
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer
from tests.trainers.dpo.step_cases import gradients

INDICES = [0, 7, 3, 3, 11]
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eps")


def distilled(folder: Path, run: str = "run", **jsd: float) -> SFTConfig:
    """The settings of `taught` with the divergence alone, or those given."""
    config = taught(sft_config(folder, run, max_steps=3))
    return replace(config, loss=SFTLoss(jsd=JSDLoss(**jsd)))


def numbers(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not any(c in name for c in CLOCKS)}
        for row in read_metrics(run)
    ]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(
    ("packing", "tokens", "beta", "weight"),
    [
        ("shared_prefix", 4096, 0.3, 0.7),
        ("shared_prefix", 20, 1.0, 1.0),
        ("padded", 20, 0.0, 0.7),
        ("padded", 4096, 0.5, 1.0),
    ],
)
def test_a_steps_gradient_is_that_of_plain_torch(
    folder: Path, packing: str, tokens: int, beta: float, weight: float
) -> None:
    config = taught(sft_config(folder, "unused"))
    weights = config.loss.class_weights if weight < 1 else ()
    loss = SFTLoss(jsd=JSDLoss(weight, beta, 1.5), class_weights=weights)
    config = replace(config, loss=loss)
    train = TrainConfig(packing=packing, tokens_per_batch=tokens, device="cpu")  # type: ignore[arg-type]
    compute = make_compute(train)
    model, tokenizer = load_policy(folder / "llama", compute), load_tokenizer(folder / "llama")
    teacher = sft.load_teacher(config, model, tokenizer, compute)
    assert teacher is not None
    data = load_data(config, config.data.train, tokenizer)
    examples = measure_examples(data.groups, compute.packing)
    terms = sft.terms_of(config.loss, tokenizer, model)
    total = sft.sft_gradient(model, examples, INDICES, compute, terms, teacher)
    found = gradients(model)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    # The same of all logits, in float64 and without our layers.
    wide, other = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        for name in ("llama", "teacher")
    )
    rows: list[list[torch.Tensor]] = [[], []]
    targets = []
    for index in INDICES:
        prompt, ids = data.groups[index].prompt_ids, data.groups[index].response_ids[0]
        for into, each in zip(rows, (wide, other), strict=True):
            into.append(each(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1])
        targets.append(torch.tensor(ids))
    logits, its = torch.cat(rows[0]), torch.cat(rows[1])
    assert (logits.shape[1], its.shape[1]) == (320, 326)
    p, q = (logits / 1.5).softmax(-1), (its[:, :320].detach() / 1.5).softmax(-1)
    if beta in (0, 1):
        jsd = (kl(q, p) if beta == 0 else kl(p, q)).mean()
    else:
        mixture = beta * q + (1 - beta) * p
        jsd = (beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)).mean()
    of_class = torch.ones(320, dtype=torch.float64)
    of_class[tokenizer.eos_token_id] = 3.0 if weights else 1.0
    likelihood = F.cross_entropy(logits, torch.cat(targets), of_class)
    expected = weight * jsd + (1 - weight) * likelihood
    expected.backward()  # type: ignore[no-untyped-call]
    metrics = total.metrics()
    assert total.loss == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["jsd"] == pytest.approx(jsd.item(), rel=1e-5)
    plain = F.cross_entropy(logits, torch.cat(targets)).item()
    assert metrics["cross_entropy"] == pytest.approx(plain, rel=1e-5)
    for name, value in gradients(wide).items():
        size = value.abs().max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-4 * size)


def test_a_run_learns_from_its_teacher_as_a_path_or_an_object(folder: Path) -> None:
    config = distilled(folder, "path")
    config = replace(
        config,
        optim=replace(config.optim, lr=1e-2, warmup_steps=0),
        train=replace(config.train, max_steps=12),
    )
    train_sft(config)
    rows = read_metrics(folder / "path")
    assert rows[-1]["jsd"] < 0.9 * rows[0]["jsd"]
    assert rows[-1]["jsd"] == pytest.approx(rows[-1]["loss"])
    assert rows[-1]["eval_jsd"] == pytest.approx(rows[-1]["eval_loss"])
    assert {"cross_entropy", "entropy", "mean_token_accuracy", "num_target_tokens"} < rows[0].keys()
    again = replace(config, teacher=TeacherConfig())
    given = replace(again, run=replace(config.run, dir=str(folder / "object")))
    result = fastalign.train_sft(given, teacher=folder / "teacher")
    assert numbers(folder / "path") == numbers(folder / "object")
    # A teacher with the student's rows may be an object, or the result of a run; it stays as it is.
    other = tiny_model("gpt2", vocab_size=320, seed=2)
    save_model(other, make_tokenizer(), folder / "other")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for name, teacher in (("a", other), ("b", folder / "other")):
        fastalign.train_sft(
            replace(again, run=replace(config.run, dir=str(folder / name))), teacher=teacher
        )
    assert numbers(folder / "a") == numbers(folder / "b") != numbers(folder / "path")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    result = fastalign.train_sft(
        replace(again, run=replace(config.run, dir=str(folder / "c"))), teacher=result
    )
    assert result.finished
    with pytest.raises(ValueError, match=r"teacher: expected a vocabulary of 320 rows .* got 326"):
        fastalign.train_sft(
            replace(again, run=replace(config.run, dir=str(folder / "d"))),
            teacher=load_policy(folder / "teacher"),
        )


def test_the_command_trains_as_python_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distilled(folder, "python", weight=0.6, beta=0.2, temperature=2.0)
    train_sft(config)
    capsys.readouterr()
    words = [
        *("sft", "--model.path", str(folder / "llama"), "--data.train", config.data.train),
        *("--data.eval", config.data.eval, "--run.dir", str(folder / "typed")),
        *("--teacher.path", str(folder / "teacher"), "--loss.jsd.weight", "0.6"),
        *("--loss.jsd.beta", "0.2", "--loss.jsd.temperature", "2"),
        *("--optim.lr", "1e-3", "--optim.warmup-steps", "2", "--optim.weight-decay", "0.1"),
        *("--train.max-steps", "3", "--train.batch-size", "4", "--train.device", "cpu"),
    ]
    assert main(words) == 0  # type: ignore[arg-type]
    assert numbers(folder / "python") == numbers(folder / "typed")
    printed = capsys.readouterr().out
    assert "the teacher's head has 326 rows, the model's 320: the divergence is over" in printed


def test_an_offloaded_teacher_changes_no_bit(folder: Path) -> None:
    config = distilled(folder, "plain", weight=0.5)
    train_sft(config)
    moved = replace(config, run=replace(config.run, dir=str(folder / "moved")))
    train_sft(replace(moved, teacher=replace(config.teacher, offload=True)))
    assert numbers(folder / "plain") == numbers(folder / "moved")
    ends = [load_file(folder / run / "model/model.safetensors") for run in ("plain", "moved")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_resumed_run_must_have_the_teacher_that_it_had(folder: Path) -> None:
    config = distilled(folder, "run")
    train_sft(replace(config, train=replace(config.train, stop_at_step=1)))
    resumed = replace(config, run=replace(config.run, resume=True))
    other = tiny_model("llama", vocab_size=326, seed=3)
    save_model(other, make_tokenizer(), folder / "teacher")
    with pytest.raises(ValueError, match=r"the frozen teacher is not what .* was trained on"):
        train_sft(resumed)
    accepted = replace(resumed, run=replace(resumed.run, accept_changed=("teacher",)))
    assert train_sft(accepted).finished


def test_what_has_no_effect_or_no_sense_is_refused(folder: Path) -> None:
    for wrong, message in (
        ({"beta": 1.5}, r"loss\.jsd\.beta: expected a number in \[0, 1\], got 1\.5"),
        ({"beta": -0.1}, r"loss\.jsd\.beta: expected a number in \[0, 1\], got -0\.1"),
        ({"weight": 0.0}, r"loss\.jsd\.weight: expected a number in \(0, 1\], got 0\.0"),
        ({"weight": 1.1}, r"loss\.jsd\.weight: expected a number in \(0, 1\], got 1\.1"),
        ({"temperature": 0.0}, r"loss\.jsd\.temperature: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            JSDLoss(**wrong)
    plain = sft_config(folder, "run")
    alone = replace(plain, loss=SFTLoss(jsd=JSDLoss(weight=0.5)))
    moved = replace(plain, teacher=TeacherConfig(offload=True))
    smoothed = distilled(folder)
    smoothed = replace(smoothed, loss=SFTLoss(label_smoothing=0.1))
    for config, message in (
        (alone, r"loss\.jsd\.weight: 0\.5 is a setting of a teacher; expected teacher\.path with"),
        (moved, r"teacher\.offload: True is a setting of a teacher; expected teacher\.path with"),
        (smoothed, r"loss\.label_smoothing: .* expected loss\.jsd\.weight below 1 with it, got 1"),
    ):
        for call in (train_sft, estimate_run):
            with pytest.raises(ValueError, match=message):
                call(config)
    assert not (folder / "run").exists()
    save_model(
        tiny_model("llama", vocab_size=320), make_tokenizer(prefix_space=True), folder / "foreign"
    )
    foreign = replace(plain, teacher=TeacherConfig(path=str(folder / "foreign")))
    with pytest.raises(ValueError, match=r"^teacher\.path: expected the policy's tokens") as raised:
        train_sft(foreign)
    assert "\n" not in str(raised.value)


def test_the_estimate_counts_the_teacher(folder: Path) -> None:
    config = distilled(folder)
    found = estimate_run(config)
    plain = estimate_run(replace(config, teacher=TeacherConfig()))
    teacher = load_policy(folder / "teacher")
    tensors = [*teacher.parameters(), *teacher.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.num_parameters == plain.num_parameters
    for phase in ("training step", "evaluation"):
        with_it, without = found.phases[phase], plain.phases[phase]
        assert with_it.weights - without.weights == size
        assert with_it.states == without.states
        assert with_it.activations > without.activations
    shared = [
        estimate_run(replace(each, parallel=replace(each.parallel, strategy="fsdp")), ranks=2)
        for each in (config, replace(config, teacher=TeacherConfig()))
    ]
    more = shared[0].phases["training step"].weights - shared[1].phases["training step"].weights
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    assert 0.5 * size <= more < 0.6 * size
