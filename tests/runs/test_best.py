"""The best evaluation's model is written, patience ends a run; a resume changes neither."""

import errno
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.models.load import load_policy
from fastalign.ranks.world import ALONE
from fastalign.runs import best as best_module
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.best import Best, BestModel, direction_of
from fastalign.runs.checkpoint import writer
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_for_training, load_sets
from fastalign.runs.open import make_compute, open_run
from fastalign.trainers import train_kto, train_sft
from fastalign.trainers.sft import evaluate_sft, sft_gradient
from tests import rank_processes as ranks
from tests.ranks.test_ranks import DDP, FSDP, TRAINERS, lora
from tests.runs.test_resume import numbers
from tests.small_runs import read_metrics, saved_tensors, sentence, sft_config, write_rows
from tests.trainers.kto.test_kto import kto_config

LAST = 7


def overfitting(folder: Path, run: str, **train: Any) -> Any:
    """A run that learns one text by heart, with others held out: evaluated after each step."""
    rows = [{"text": "The" + sentence(1, 8)}]
    held_out = [{"text": "The" + sentence(n, 6)} for n in range(7, 11)]
    sources = [
        str(write_rows(folder / f"{name}.jsonl", rows_of))
        for name, rows_of in (("few", rows), ("held", held_out))
    ]
    settings = {"max_steps": LAST, "eval_every": 1, "best_metric": "eval_loss"}
    config = sft_config(folder, run, **(settings | {"keep_checkpoints": 1} | train))
    optim = replace(config.optim, lr=0.1, schedule="constant", warmup_steps=0)
    config = replace(config, optim=optim)
    return replace(config, data=replace(config.data, train=sources[0], eval=sources[1]))


def model_of(run: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / part / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def checkpoints(run: Path) -> list[int]:
    found = (path.name.removeprefix("step-") for path in (run / "checkpoints").iterdir())
    return sorted(map(int, found))


def test_a_run_that_overfits_writes_the_earlier_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_sft(overfitting(folder, "run"))
    losses = [row["eval_loss"] for row in read_metrics(folder / "run")]
    step = 1 + losses.index(min(losses))
    assert 1 < step < LAST, losses
    assert losses[-1] > 1.1 * min(losses)
    assert (result.step, result.finished, result.best) == (LAST, True, Best(step, min(losses)))
    assert checkpoints(folder / "run") == [step, LAST]
    kept = saved_tensors(folder / f"run/checkpoints/step-{step:06d}", "model.")
    last = saved_tensors(folder / f"run/checkpoints/step-{LAST:06d}", "model.")
    written = model_of(folder / "run")
    assert same(written, kept)
    assert not same(written, last)

    # What was written has the value that was logged.
    compute = make_compute(TrainConfig(device="cpu"))
    config = overfitting(folder, "again")
    model, tokenizer = load_for_training(config, compute)
    _, held_out = load_sets(config, model, tokenizer)
    assert held_out is not None
    examples = measure_examples(held_out.groups, compute.packing)
    model = load_policy(folder / "run/model", compute)
    found = evaluate_sft(model, examples, compute)["eval_loss"]
    assert found == pytest.approx(min(losses), rel=1e-6)

    out = capsys.readouterr().out
    assert f"step {step}: eval_loss {min(losses):.6g}, the best so far" in out
    line = f"step {LAST}: eval_loss {losses[-1]:.6g}, no better than {min(losses):.6g} of step"
    assert f"{line} {step} ({LAST - step})" in out
    end = f"eval_loss was best at step {step} of {LAST}: {min(losses):.6g}; the model is that"
    assert end in out
    card = (folder / "run/model/README.md").read_text()
    assert f"Steps: {step} of {LAST}, the best by eval_loss ({min(losses):.6g})" in card
    assert f"at step {step}:" in card

    # Without the setting it is the last step's, from the same steps.
    train_sft(overfitting(folder, "plain", best_metric=None))
    assert same(model_of(folder / "plain"), last)
    assert [row["eval_loss"] for row in read_metrics(folder / "plain")] == losses


def best_of(run: Path, step: int) -> dict[str, float]:
    state = json.loads((run / f"checkpoints/step-{step:06d}/state.json").read_text())
    return {name: value for name, value in state["kept"].items() if name.startswith("best/")}


def test_a_stop_at_any_step_changes_nothing(folder: Path) -> None:
    straight, whole = train_sft(overfitting(folder, "straight")), folder / "straight"
    assert straight.best is not None
    for stop in (1, straight.best.step, straight.best.step + 1):
        run = folder / f"run-{stop}"
        config = partial(overfitting, folder, run.name)
        first = train_sft(config(stop_at_step=stop))
        losses = [row["eval_loss"] for row in read_metrics(run)]
        assert first.best == Best(1 + losses.index(min(losses)), min(losses))
        assert not (run / "model").exists()
        assert train_sft(config(resume=True)).best == straight.best
        assert numbers(run) == numbers(whole)
        assert same(model_of(run), model_of(whole))
        assert checkpoints(run) == checkpoints(whole)
        assert best_of(run, LAST) == best_of(whole, LAST) != {}
        cards = [(each / "model/README.md").read_text() for each in (run, whole)]
        assert cards[0] == cards[1]


def test_a_run_that_was_killed_behind_its_best_step_goes_on_from_there(folder: Path) -> None:
    straight = train_sft(overfitting(folder, "straight"))
    assert straight.best is not None
    train_sft(overfitting(folder, "run", stop_at_step=straight.best.step + 1))
    newest = f"run/checkpoints/step-{straight.best.step + 1:06d}"
    shutil.rmtree(folder / newest)  # as if it had not been written
    assert checkpoints(folder / "run") == [straight.best.step]
    assert train_sft(overfitting(folder, "run", resume=True)).best == straight.best
    assert numbers(folder / "run") == numbers(folder / "straight")
    assert same(model_of(folder / "run"), model_of(folder / "straight"))


def test_patience_ends_the_run_and_more_of_it_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_sft(overfitting(folder, "straight"))
    assert straight.best is not None
    step, value = straight.best
    end = step + 2
    assert end < LAST
    result = train_sft(overfitting(folder, "run", patience=2))
    assert (result.step, result.finished, result.exit_code) == (end, True, 0)
    assert result.best == straight.best
    assert same(model_of(folder / "run"), model_of(folder / "straight"))
    assert [row["step"] for row in read_metrics(folder / "run")] == list(range(1, end + 1))
    out = capsys.readouterr().out
    assert f"ended at step {end}: 2 evaluations in a row without a better eval_loss" in out
    assert f"best at step {step} of {end}: {value:.6g}; the model is that step's" in out

    # Resumed, it has ended; with more patience it goes on as a run that always had it.
    shutil.rmtree(folder / "run/model")
    again = train_sft(overfitting(folder, "run", patience=2, resume=True))
    assert (again.step, again.finished) == (end, True)
    assert same(model_of(folder / "run"), model_of(folder / "straight"))
    longer = train_sft(overfitting(folder, "run", patience=LAST, resume=True))
    assert (longer.step, longer.best) == (LAST, straight.best)
    assert numbers(folder / "run") == numbers(folder / "straight")


def test_patience_is_counted_over_a_stop(folder: Path) -> None:
    straight = train_sft(overfitting(folder, "straight", patience=2))
    stopped = train_sft(overfitting(folder, "run", patience=2, stop_at_step=straight.step - 1))
    assert not stopped.finished
    result = train_sft(overfitting(folder, "run", patience=2, resume=True))
    assert (result.step, result.finished, result.best) == (straight.step, True, straight.best)
    assert numbers(folder / "run") == numbers(folder / "straight")


def test_an_unfinished_run_exports_its_best_so_far(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_sft(overfitting(folder, "straight"))
    assert straight.best is not None
    train_sft(overfitting(folder, "run", stop_at_step=LAST - 1))
    told = f"eval_loss was best at step {straight.best.step} so far: {straight.best.value:.6g}"
    assert told in capsys.readouterr().out
    config = overfitting(folder, "run", resume=True)
    out = replace(config, run=replace(config.run, export=str(folder / "out")))
    assert train_sft(out).best == straight.best
    assert same(model_of(folder / "out"), model_of(folder / "straight"))
    newest = replace(config.run, export=str(folder / "newest"))
    train_sft(replace(overfitting(folder, "run", best_metric=None), run=newest))
    last = saved_tensors(folder / f"run/checkpoints/step-{LAST - 1:06d}", "model.")
    assert same(model_of(folder / "newest"), last)


@pytest.mark.parametrize("fails", ["first", "best", "later"])
def test_a_best_step_whose_checkpoint_fails_is_not_the_best(
    folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_sft(overfitting(folder, "straight"))
    losses = [row["eval_loss"] for row in read_metrics(folder / "straight")]
    assert straight.best is not None
    step = straight.best.step
    lost = {"first": 1, "best": step, "later": step + 1}[fails]
    plain = writer.publish

    def publish(aside: Path, final: Path, *arguments: Any) -> None:
        if final.name == f"step-{lost:06d}":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(aside, final, *arguments)

    monkeypatch.setattr(writer, "publish", publish)
    result = train_sft(overfitting(folder, "run"))
    left = [(loss, number) for number, loss in enumerate(losses, 1) if number != lost]
    if fails == "best":
        _, step = min(left)
    assert result.best == Best(step, losses[step - 1])
    kept = saved_tensors(folder / f"run/checkpoints/step-{step:06d}", "model.")
    assert same(model_of(folder / "run"), kept)
    assert ("was not written" in capsys.readouterr().out) == (fails != "later")


def test_a_best_checkpoint_that_is_gone_or_damaged_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_sft(overfitting(folder, "straight"))
    assert straight.best is not None
    step = straight.best.step
    for run in ("damaged", "gone"):
        train_sft(overfitting(folder, run, stop_at_step=LAST - 1))
    file = next((folder / f"damaged/checkpoints/step-{step:06d}").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"best step's checkpoint cannot be used: .*damaged"):
        train_sft(overfitting(folder, "damaged", resume=True))
    result = train_sft(overfitting(folder, "damaged", resume=True, best_metric=None))
    assert (result.finished, result.best) == (True, None)
    shutil.rmtree(folder / f"gone/checkpoints/step-{step:06d}")
    capsys.readouterr()
    result = train_sft(overfitting(folder, "gone", resume=True))
    assert result.best is not None
    assert result.best.step == LAST
    assert f"step-{step:06d}, the best by eval_loss so far, is gone" in capsys.readouterr().out


METRICS = {
    "sft": ("eval_mean_token_accuracy", "loss"),
    "dpo": ("eval_rewards/accuracies", "rewards/accuracies"),
    "kto": ("eval_rewards/margins", "margins"),
    "reward": ("eval_accuracy", "eval_acuracy"),
    "ppo": ("eval_reward", "eval_rewards"),
    "online-dpo": ("eval_objective/scores", "objective/scores"),
}


EVERY = {**TRAINERS, "kto": (kto_config, train_kto)}


@pytest.mark.parametrize("trainer", EVERY)
def test_every_trainer_chooses_by_its_evaluations_and_names_them(
    folder: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, train = EVERY[trainer]
    metric, wrong = METRICS[trainer]
    settings: dict[str, Any] = {"eval_every": 1, "max_steps": 4, "batch_size": 7}
    if trainer == "online-dpo":
        settings["eval"] = str(folder / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"^train\.best_metric: expected a metric of") as error:
        train(make(folder, "refused", **settings, best_metric=wrong))
    meant = "eval_loss" if trainer == "sft" else metric
    assert f"got '{wrong}' (did you mean {meant}?)" in str(error.value)
    assert metric in str(error.value)
    assert not (folder / "refused/metrics.jsonl").exists()
    result = train(make(folder, "run", **settings, best_metric=metric, keep_checkpoints=4))
    rows = read_metrics(folder / "run")
    values = [row[metric] for row in rows]
    shown = str(error.value).partition("one of ")[2].partition("; got")[0].split(", ")
    given = {name for name in rows[0] if name.startswith("eval_")}
    assert {*shown} <= given
    assert not {name for name in given - {*shown} if "num_" not in name and "time/" not in name} - {
        "eval_sampling/policy_version"
    }
    assert result.best == Best(1 + values.index(max(values)), max(values))
    kept = saved_tensors(folder / f"run/checkpoints/step-{result.best.step:06d}", "model.")
    parts = {"model": "policy.", "value": "value."} if trainer == "ppo" else {"model": ""}
    for part, prefix in parts.items():
        for name, value in model_of(folder / "run", part).items():
            assert torch.equal(value, kept[prefix + name]), (part, name)
    if trainer in ("ppo", "online-dpo"):  # the evaluation on trial changes no later sample
        train(make(folder, "plain", **settings))
        assert numbers(folder / "plain") == numbers(folder / "run")
    train(make(folder, "stopped", **settings, best_metric=metric, stop_at_step=2))
    again = train(make(folder, "stopped", **settings, best_metric=metric, resume=True))
    assert again.best == result.best
    assert numbers(folder / "stopped") == numbers(folder / "run")
    assert same(model_of(folder / "stopped"), model_of(folder / "run"))


@pytest.mark.parametrize(
    ("trainer", "parallel", "change"),
    [("dpo", FSDP, lora), ("ppo", DDP, None)],
    ids=["dpo, fsdp, adapter", "ppo, ddp"],
)
def test_ranks_choose_and_write_the_same(
    folder: Path, trainer: str, parallel: Any, change: Any
) -> None:
    make, train = TRAINERS[trainer]
    metric = METRICS[trainer][0] if trainer == "ppo" else "eval_loss"
    direction = "min" if trainer == "ppo" else "auto"  # a step before the last
    num_steps = 3

    def config(run: str, **changes: Any) -> Any:
        settings = {"eval_every": 1, "max_steps": num_steps, "batch_size": 7}
        best = {"best_metric": metric, "best_direction": direction, "keep_checkpoints": 1}
        found = make(folder, run, **(settings | best | changes))
        if trainer == "dpo":  # after the first step it is worse
            found = replace(found, optim=replace(found.optim, lr=1.0, warmup_steps=0))
        return replace(found if change is None else change(found), parallel=parallel)

    runs = [config("straight"), config("run", stop_at_step=2), config("run", resume=True)]
    said = ranks.run(2, folder / "logs", ranks.in_turn, train, runs)
    values = [row[metric] for row in read_metrics(folder / "straight")]
    step = 1 + values.index(min(values))
    assert step < num_steps, values
    assert checkpoints(folder / "straight") == checkpoints(folder / "run") == [step, num_steps]
    line = f"was best at step {step} of {num_steps}"
    assert [text.count(line) for text in said] == [2, 0]
    early = config("early", best_metric=None, best_direction="auto", stop_at_step=step)
    export = replace(early.run, resume=True, export=str(folder / "out"))
    exporting = replace(early, run=export, train=replace(early.train, stop_at_step=None))
    ranks.run(2, folder / "logs", ranks.in_turn, train, [early, exporting])
    file = "adapter/adapter_model.safetensors" if change is lora else "model/model.safetensors"
    expected, *written = (load_file(folder / run / file) for run in ("out", "straight", "run"))
    assert all(same(expected, each) for each in written)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"best_metric": "eval_loss", "eval_every": 0}, "train.eval_every: expected more than 0"),
        ({"best_metric": None, "patience": 3}, "train.patience: a setting of train.best_metric"),
        ({"best_metric": None, "best_direction": "min"}, "train.best_direction: a setting of"),
        ({"best_metric": "eval_loss", "patience": 0}, "train.patience: expected at least 1, got 0"),
        ({"best_direction": "more"}, "train.best_direction: expected auto, max, min, got 'more'"),
    ],
)
def test_settings_that_cannot_choose_are_refused(
    folder: Path, train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        overfitting(folder, "run", **train)


def test_a_choice_without_held_out_data_or_direction_is_refused(folder: Path) -> None:
    config = overfitting(folder, "run")
    with pytest.raises(ValueError, match=r"^train\.best_metric: .*\(--data\.eval\), got none"):
        train_sft(replace(config, data=replace(config.data, eval=None)))
    assert not (folder / "run").exists()
    with pytest.raises(ValueError, match=r"train\.best_direction: expected max or min, since eval"):
        train_sft(overfitting(folder, "run", best_metric="eval_entropy"))
    result = train_sft(overfitting(folder, "run", best_metric="eval_entropy", best_direction="max"))
    values = [row["eval_entropy"] for row in read_metrics(folder / "run")]
    assert result.best == Best(1 + values.index(max(values)), max(values))


def test_a_resume_with_other_held_out_data_cannot_be_compared(folder: Path) -> None:
    train_sft(overfitting(folder, "run", stop_at_step=3))
    config = overfitting(folder, "run", resume=True)
    other = replace(config, data=replace(config.data, eval=config.data.train))
    with pytest.raises(ValueError, match=r"settings differ from the run's: data\.eval \("):
        train_sft(other)
    plain = replace(other, train=replace(other.train, best_metric=None))
    assert train_sft(plain).finished


def own_loop(
    config: Any, *, named: bool = True, tried: bool = False, fails_behind: int | None = None
) -> Any:
    """A loop of somebody's own, which evaluates by metrics of its own."""
    with open_run(config, "own") as run:
        model, tokenizer = load_for_training(config, run.compute)
        data, held_out = load_sets(config, model, tokenizer)
        assert held_out is not None
        examples = measure_examples(data.groups, run.compute.packing)

        def try_evaluation() -> dict[str, float]:
            return {"eval_mine" if named else "eval_other": torch.rand(1).item()}

        run.begin(model, data, try_evaluation=try_evaluation if tried else None)
        for step in run.steps():
            step.finish(run.optimise(sft_gradient(model, examples, step.indices, run.compute)))
            value = {3: 5.0, 4: 9.0, 6: math.nan}.get(step.number, 1.0)
            step.log({"eval_mine" if named else "eval_other": value, "mine": 100.0})
            step.log({"drawn": torch.rand(())})
            if step.number == fails_behind:
                raise KeyError("of the loop's own")
        return run.end(model, tokenizer)


def own_config(folder: Path, run: str, **train: Any) -> Any:
    best = {"best_metric": "eval_mine", "best_direction": "max"}
    return overfitting(folder, run, **(best | train))


def test_a_loop_of_somebody_s_own_chooses_by_a_metric_of_its_own(folder: Path) -> None:
    assert own_loop(own_config(folder, "own")).best == Best(4, 9.0)
    early = own_loop(own_config(folder, "early", patience=3))
    assert (early.step, early.finished, early.best) == (7, True, Best(4, 9.0))
    for fails_behind in (4, 5):  # its evaluation was logged, and the step is over
        run = f"fails-{fails_behind}"
        with pytest.raises(KeyError, match=f"step {fails_behind} is saved"):
            own_loop(own_config(folder, run), fails_behind=fails_behind)
        assert own_loop(own_config(folder, run, resume=True)).best == Best(4, 9.0)
        assert same(model_of(folder / run), model_of(folder / "own"))
    message = r"one of eval_other; got 'eval_mine'\nstep 1 is saved, go on"
    with pytest.raises(ValueError, match=message):
        own_loop(own_config(folder, "other"), named=False)
    with pytest.raises(ValueError, match="one of eval_other; got 'eval_mine'"):
        own_loop(own_config(folder, "tried"), named=False, tried=True)
    assert not (folder / "tried/metrics.jsonl").exists()
    # An evaluation on trial draws nothing of what the steps draw.
    own_loop(own_config(folder, "tried"), tried=True)
    drawn = [[row["drawn"] for row in read_metrics(folder / run)] for run in ("own", "tried")]
    assert drawn[0] == drawn[1]


def test_evaluations_without_a_finite_value_choose_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def considered(metric: str, values: list[float], **train: Any) -> tuple[BestModel, list[str]]:
        settings = TrainConfig(best_metric=metric, eval_every=1, **train)
        state: Any = SimpleNamespace(kept={}, step=0)
        best = BestModel(settings, state, folder, ALONE)
        best.begin(None)
        lines = []
        for value in values:
            state.step += 1
            lines.append(best.consider({"loss": 0.0, metric: value}))
        return best, lines

    nan, inf = math.nan, math.inf
    best, lines = considered("eval_loss", [nan, inf, -inf], patience=3)
    assert (best.best, best.out_of_patience) == (None, True)
    assert lines[0] == "step 1: eval_loss nan, not finite (1 of 3)"
    line = best.final_line()
    assert "no evaluation gave a finite eval_loss: the model is that of step 3" in line
    best, lines = considered("eval_loss", [nan, 2.0, 2.0, nan, 1.5, 1.5])
    assert (best.best, best.num_not_better) == (Best(5, 1.5), 1)
    assert lines[2] == "step 3: eval_loss 2, no better than 2 of step 2 (1)"
    best, _ = considered("eval_accuracy", [0.5, 0.7, 0.7, 0.6])
    assert best.best == Best(2, 0.7)
    assert best.consider({"loss": 1.0}) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval_loss", "min"),
        ("eval_objective/kl", "min"),
        ("eval_completions/clipped_ratio", "min"),
        ("eval_rewards/accuracies", "max"),
        ("eval_rewards/margins", "max"),
        ("eval_rewards/words/mean", "max"),
        ("eval_mean_token_accuracy", "max"),
        ("eval_accuracy", "max"),
        ("eval_margin", "max"),
        ("eval_reward", "max"),
        ("eval_objective/rlhf_reward", "max"),
        *((name, None) for name in ("eval_entropy", "eval_rewards/rejected", "eval_logps/chosen")),
        *((name, None) for name in ("eval_completions/mean_length", "eval_reward_std")),
    ],
)
def test_the_direction_follows_from_the_metric_or_is_asked_for(
    metric: str, direction: str | None
) -> None:
    train = TrainConfig(best_metric=metric, eval_every=1)
    if direction is None:
        with pytest.raises(ValueError, match=r"^train\.best_direction: expected max or min"):
            direction_of(train)
    else:
        assert direction_of(train) == direction
    other = TrainConfig(best_metric=metric, eval_every=1, best_direction="min")
    assert best_module.direction_of(other) == "min"
