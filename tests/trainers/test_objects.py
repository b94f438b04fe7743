"""Runs from objects in memory in place of paths, and loops of one's own."""

import json
import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastalign
from fastalign.cli.main import main
from fastalign.in_memory import NOT_GIVEN
from fastalign.losses import PairLogprobs, dpo, formula, hinge
from fastalign.ranks.errors import UserCodeFailed
from fastalign.rollouts import SamplingParams
from fastalign.trainers import (
    LOSSES,
    DPOConfig,
    Grpo,
    KLInLoss,
    KTOConfig,
    LoraConfig,
    ModelConfig,
    OnlineDPOConfig,
    PPOConfig,
    PPOSettings,
    PromptDataConfig,
    RewardConfig,
    RewardSourceConfig,
    RunConfig,
    RunResult,
    SFTConfig,
    UnpairedDataConfig,
)
from fastalign.trainers.reward.train import LOG_NU
from tests import rank_processes
from tests.small_runs import (
    OPTIM,
    TRAIN,
    WORDS,
    dpo_config,
    ppo_config,
    read_metrics,
    reward_config,
    saved_tensors,
    scored_by_answers,
    sft_config,
    shared_letters,
    words_reward,
)

STEPS = 3
# What differs between two runs of the same settings.
OF_CLOCKS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eps")
OF_RUNS = ("README.md", "fastalign_manifest.json")  # the paths, and the run's own name


def online_config(folder: Path, run: str, **train: Any) -> OnlineDPOConfig:
    source = ppo_config(folder, run).data.train
    return OnlineDPOConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=PromptDataConfig(train=source, eval=source),
        reward=RewardSourceConfig((words_reward(folder),)),
        run=RunConfig(dir=str(folder / run)),
        sampling=SamplingParams(max_new_tokens=5, num_samples=3),
        optim=OPTIM,
        train=replace(TRAIN, **train),
    )


def kto_config(folder: Path, run: str, **train: Any) -> KTOConfig:
    config = dpo_config(folder, run, **train)
    data = UnpairedDataConfig(train=config.data.train, eval=config.data.eval)
    parts = {name: getattr(config, name) for name in ("model", "run", "reference", "train")}
    return KTOConfig(data=data, optim=OPTIM, **parts)


def with_answers(make: Any) -> Any:
    def made(folder: Path, run: str, **train: Any) -> Any:
        return scored_by_answers(make(folder, run, **train))

    return made


CASES = {
    "sft": sft_config,
    "dpo": dpo_config,
    "kto": kto_config,
    "reward": reward_config,
    "ppo": with_answers(ppo_config),
    "online_dpo": with_answers(online_config),
}


def train(algorithm: str) -> Any:
    return getattr(fastalign, f"train_{algorithm}")


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def model_and_tokenizer(folder: Path) -> dict[str, Any]:
    path = str(folder / "llama")
    return {
        "model": AutoModelForCausalLM.from_pretrained(path),
        "tokenizer": AutoTokenizer.from_pretrained(path),
    }


def without_paths(config: Any, run: str) -> Any:
    """The same settings, which name a folder alone."""
    changed: dict[str, Any] = {
        "model": replace(config.model, path=NOT_GIVEN),
        "data": replace(config.data, train=NOT_GIVEN, eval=None),
        "run": RunConfig(dir=run),
    }
    if hasattr(config, "reward"):
        changed["reward"] = replace(config.reward, sources=(NOT_GIVEN,))
    return replace(config, **changed)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name.replace("tests.small_runs:", ""): value
            for name, value in row.items()
            if not any(part in name for part in OF_CLOCKS)
        }
        for row in rows
    ]


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OF_RUNS
    }


@pytest.mark.parametrize("algorithm", CASES)
def test_a_run_from_objects_is_the_run_from_files(algorithm: str, folder: Path) -> None:
    config = CASES[algorithm](folder, "files", max_steps=STEPS, eval_every=2)
    train(algorithm)(config)
    objects = model_and_tokenizer(folder)
    before = {name: value.clone() for name, value in objects["model"].state_dict().items()}
    rows = rows_of(config.data.train)
    if hasattr(config, "reward"):
        objects["reward"] = shared_letters
    result = train(algorithm)(
        without_paths(config, str(folder / "objects")),
        train_data=Dataset.from_list(rows) if algorithm in ("dpo", "ppo") else iter(rows),
        eval_data=rows_of(config.data.eval),
        **objects,
    )
    found, expected = (comparable(read_metrics(folder / run)) for run in ("objects", "files"))
    assert found == expected
    assert len(found) == STEPS
    assert any(name.startswith("eval_") for name in found[-1])
    assert comparable(result.metrics) == expected
    for name in ("model", "value") if algorithm == "ppo" else ("model",):
        files = written(folder / "objects" / name)
        assert files == written(folder / "files" / name)
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    # The caller's model is as it was, and the result's is the one that was written.
    after = objects["model"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    auto = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    weights = auto.from_pretrained(folder / "objects" / "model").state_dict()
    trained = result.model.state_dict()
    assert trained.keys() == weights.keys()
    assert all(torch.equal(trained[name], weights[name]) for name in weights)
    for again in (deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert all(torch.equal(trained[n], value) for n, value in again.state_dict().items())
    assert not all(torch.equal(before[name], trained[name]) for name in before.keys() & trained)


def test_what_is_not_said_has_a_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    config = SFTConfig(train=replace(TRAIN, max_steps=2))
    data = rows_of("texts.jsonl")
    results = [fastalign.train_sft(config, model="llama", train_data=data) for _ in range(2)]
    assert [result.folder for result in results] == [Path("runs/sft-1"), Path("runs/sft-2")]
    assert [row["step"] for row in results[0].metrics] == [1, 2]
    assert all(isinstance(row["loss"], float) for row in results[0].metrics)
    printed = capsys.readouterr().out
    assert "optim" not in printed  # no settings, no YAML
    assert len(printed.splitlines()) < 20
    saved = (folder / "runs/sft-1/config.yaml").read_text()
    assert "train: train_data (in memory)" in saved
    assert "path: llama" in saved
    card = (folder / "runs/sft-1/model/README.md").read_text()
    assert "`train_data (in memory)`" in card
    # Of DPO everything: its reference log-probs, its loss.
    found = fastalign.train_dpo(
        model=results[0],  # a run's result is its model with its tokenizer
        train_data="pairs.jsonl",
    )
    assert (found.step, found.finished, found.exit_code) == (1, True, 0)
    assert found.folder == Path("runs/dpo-1")
    prompt = found.tokenizer("The camera", return_tensors="pt")
    answer = found.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    again = AutoModelForCausalLM.from_pretrained("runs/dpo-1/model")
    assert answer.tolist() == again.generate(**prompt, max_new_tokens=3, do_sample=False).tolist()


def test_settings_of_a_run_from_python_name_its_objects(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a model that was made in memory names no base in its card."""
    monkeypatch.chdir(folder)
    objects = model_and_tokenizer(folder)
    objects["model"].config.name_or_path = objects["model"].name_or_path = ""
    config = SFTConfig(run=RunConfig(dir="made"), train=replace(TRAIN, max_steps=1))
    fastalign.train_sft(config, train_data=one_row(), **objects)
    card = (folder / "made/model/README.md").read_text()
    assert "- Base: a model that was made in memory\n" in card
    assert "base_model" not in card
    assert main(["sft", "--config", "made/config.yaml", "--run.resume"]) == 2
    assert "model: expected the object that the run was given in Python" in capsys.readouterr().err


def test_ranks_have_a_folder_that_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"run.dir: expected a folder for all 2 ranks, got none"):
        fastalign.train_sft(model=str(folder / "llama"), train_data=one_row())


def test_metrics_that_are_not_finite_are_numbers(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 0.5, "eval_loss": "inf"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = RunResult(2, True, 0, tmp_path).metrics
    assert first["loss"] != first["loss"]
    assert second == {"step": 2, "loss": 0.5, "eval_loss": float("inf")}
    assert RunResult(0, False, 0, tmp_path / "none").metrics == []


class Custom(torch.nn.Module):
    pass


def one_row(text: Any = "The camera is good") -> list[dict[str, Any]]:
    return [{"text": "The menu is slow"}, {"text": text}]


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "The", "chosen": " menu", "rejected": " screen", **changes}


ERRORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no model": ("sft", {"train_data": one_row()}, "model: expected an object or a path, got none"),
    "no data": ("sft", {"model": "llama"}, "train_data: expected an object or a path, got none"),
    "no reward": (
        "ppo",
        {"model": "llama", "train_data": [{"prompt": "The"}]},
        "reward: expected an object or a path, got none",
    ),
    "twice": (
        "sft",
        {"config": SFTConfig(model=ModelConfig("llama")), "model": "llama"},
        "model: expected it as an argument or as model.path, got both",
    ),
    "another algorithm's settings": (
        "sft",
        {"config": DPOConfig(), "model": "llama"},
        "config: expected a SFTConfig, got DPOConfig",
    ),
    "a module that is no model": (
        "sft",
        {"model": Custom(), "tokenizer": "llama", "train_data": one_row()},
        "model: expected a transformers model, a folder or a hub name, got Custom",
    ),
    "a number for a model": (
        "dpo",
        {"model": 3, "train_data": one_row()},
        "model: expected a transformers model, a folder or a hub name, got int",
    ),
    "a number for a reference": (
        "dpo",
        {"model": "llama", "reference": 3, "train_data": one_row()},
        "reference: expected a transformers model, a folder or a hub name, got int",
    ),
    "no tokenizer": (
        "sft",
        {"model": "unnamed", "train_data": one_row()},
        "tokenizer: expected one, since the model was made in memory and names no",
    ),
    "an object that is no tokenizer": (
        "sft",
        {"model": "llama", "tokenizer": 3, "train_data": one_row()},
        "tokenizer: expected a tokenizer of transformers, a folder or a hub name, got int",
    ),
    "splits": (
        "sft",
        {"model": "llama", "train_data": {"train": one_row(), "test": one_row()}},
        "train_data: expected rows, .* got a dict of train, test; hand over one of its values",
    ),
    "no rows": (
        "sft",
        {"model": "llama", "train_data": []},
        r"train_data \(in memory\): there are no rows",
    ),
    "no iterable": (
        "sft",
        {"model": "llama", "train_data": 5},
        r"train_data: expected a datasets.Dataset, an iterable of rows .* got int",
    ),
    "a row that is text": (
        "sft",
        {"model": "llama", "train_data": ["The camera"]},
        r"train_data\[0\]: expected a row, a dictionary of its columns, got 'The camera'",
    ),
    "a value that is no text": (
        "sft",
        {"model": "llama", "train_data": one_row(7)},
        r"train_data\[1\]: column 'text': expected text or a list of messages, got the number 7",
    ),
    "a held-out row": (
        "dpo",
        {"model": "llama", "train_data": [pair()], "eval_data": [pair(), pair(rejected=" menu")]},
        r"eval_data\[1\]: column 'rejected': identical to chosen",
    ),
    "a missing column": (
        "dpo",
        {"model": "llama", "train_data": [{"prompt": "The", "better": " menu"}]},
        r"train_data\[0\]: column 'chosen': missing; preference rows have",
    ),
    "no column for the reward": (
        "ppo",
        {"model": "llama", "train_data": [{"prompt": "The"}], "reward": shared_letters},
        r"train_data \(in memory\): column 'answer': no row has it, but reward.sources: "
        r"shared_letters \(in memory\) takes it",
    ),
    "an object that is no reward": (
        "ppo",
        {"model": "llama", "train_data": [{"prompt": "The"}], "reward": 0.5},
        r"reward: expected a function \(prompts, completions, columns by name\) -> numbers",
    ),
    "no folder to resume": (
        "sft",
        {
            "config": SFTConfig(run=RunConfig(resume=True)),
            "model": "llama",
            "train_data": one_row(),
        },
        "run.dir: expected the folder of the run that is resumed, got none",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_names_the_argument_and_the_row(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    algorithm, arguments, message = ERRORS[case]
    if arguments.get("model") == "unnamed":
        config = AutoModelForCausalLM.from_pretrained("llama").config
        config.name_or_path = ""
        arguments = arguments | {"model": AutoModelForCausalLM.from_config(config)}
    with pytest.raises(ValueError, match=message) as raised:
        train(algorithm)(**arguments)
    assert "\n" not in str(raised.value)


def test_a_model_with_an_adapter_or_code_of_its_own_is_refused(folder: Path) -> None:
    objects = model_and_tokenizer(folder)
    kind = type(objects["model"])
    mine = type("Mine", (kind,), {})(objects["model"].config)
    with pytest.raises(ValueError, match=r"expected a LlamaForCausalLM, got a Mine, whose own"):
        fastalign.train_sft(model=mine, tokenizer=objects["tokenizer"], train_data=one_row())
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    adapted = get_peft_model(objects["model"], PeftLora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model \(in memory\): expected a model without an adapt"):
        fastalign.train_sft(model=adapted, tokenizer=objects["tokenizer"], train_data=one_row())


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_from_objects_resumes_and_compares_them(folder: Path) -> None:
    rows = rows_of(scored_by_answers(ppo_config(folder, "x")).data.train)

    def run(name: str, reward: Any = shared_letters, rows: Any = rows, **train_of: Any) -> Any:
        config = PPOConfig(
            run=RunConfig(dir=str(folder / name), resume=train_of.pop("resume", False)),
            sampling=SamplingParams(max_new_tokens=4, num_samples=2),
            ppo=PPOSettings(advantage=Grpo(), epochs=1),
            kl=KLInLoss(),
            optim=OPTIM,
            train=replace(TRAIN, max_steps=3, **train_of),
        )
        objects = model_and_tokenizer(folder)
        return fastalign.train_ppo(config, train_data=rows, reward=reward, **objects)

    straight = run("straight")
    stopped = run("stopped", stop_at_step=1)
    assert (stopped.finished, stopped.step, len(stopped.metrics)) == (False, 1, 1)

    def shared_letters_(completions: list[str], answer: list[str]) -> list[float]:
        return [2.0 * value for value in shared_letters(completions, answer)]

    shared_letters_.__name__ = "shared_letters"
    with pytest.raises(ValueError, match=r"the reward .*source text.* not what"):
        run("stopped", shared_letters_, resume=True)
    with pytest.raises(ValueError, match="the training data is not what"):
        run("stopped", rows=rows[:-1], resume=True)
    resumed = run("stopped", resume=True)
    assert comparable(resumed.metrics) == comparable(straight.metrics)
    ends = [saved_tensors(folder / name / "model") for name in ("straight", "stopped")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_adapter_is_trained_on_a_model_in_memory(folder: Path) -> None:
    objects = model_and_tokenizer(folder)
    with torch.no_grad():  # not what its folder holds
        objects["model"].model.layers[0].mlp.up_proj.weight.mul_(2.0)
    config = replace(dpo_config(folder, "lora", max_steps=2), model=ModelConfig())
    config = replace(config, model=ModelConfig(lora=LoraConfig(rank=2)))
    config = without_paths(config, str(folder / "lora"))
    rows = rows_of(str(folder / "pairs.jsonl"))
    result = fastalign.train_dpo(config, train_data=rows, **objects)
    assert (folder / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    merged = result.model.model.layers[0].mlp.up_proj.weight
    base = objects["model"].model.layers[0].mlp.up_proj.weight
    assert 0 < (merged - base).abs().max() < 0.1 * base.abs().max()


def test_a_reference_and_a_reward_model_in_memory(folder: Path) -> None:
    config = replace(reward_config(folder, "reward", max_steps=2))
    rewarded = fastalign.train_reward(
        without_paths(config, str(folder / "reward")),
        model=str(folder / "llama"),
        train_data=config.data.train,
    )
    assert not hasattr(rewarded.model, LOG_NU)
    assert rewarded.model.config.tie_model == "rao_kupper"
    # Its scores are those of its folder, in DPO on fresh samples and as PPO's value model.
    prompts = [{"prompt": f"The {word}"} for word in WORDS]
    sources = {"folder": str(folder / "reward" / "model"), "object": rewarded}
    found = {}
    for name, reward in sources.items():
        settings = without_paths(ppo_config(folder, name, max_steps=1), str(folder / name))
        settings = replace(settings, reward=RewardSourceConfig())
        result = fastalign.train_ppo(
            settings, model=str(folder / "llama"), train_data=prompts, reward=reward
        )
        found[name] = comparable(result.metrics)[0]
    short = {"folder": "rewards/reward/mean", "object": "rewards/reward/mean"}
    assert found["folder"].pop(short["folder"]) == found["object"].pop(short["object"])
    assert found["folder"] == found["object"]
    # Another model as the reference: given in memory, it is the one of the folder.
    other = AutoModelForCausalLM.from_pretrained(str(folder / "llama"))
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    other.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(str(folder / "llama")).save_pretrained(folder / "other")
    other.config.name_or_path = other.name_or_path = ""  # it has the policy's tokens
    ends = []
    for name, reference in (("from-object", other), ("from-path", folder / "other")):
        dpo_settings = without_paths(dpo_config(folder, name, max_steps=2), str(folder / name))
        fastalign.train_dpo(
            dpo_settings,
            model=str(folder / "llama"),
            train_data=folder / "pairs.jsonl",
            reference=reference,
        )
        ends.append(comparable(read_metrics(folder / name)))
    assert ends[0] == ends[1]
    assert abs(ends[0][0]["rewards/chosen"]) > 0.01  # not the policy itself


def test_rewards_of_one_name_are_told_apart(folder: Path) -> None:
    config = replace(online_config(folder, "x"), loss=LOSSES["dpo"]())
    config = without_paths(replace(config, train=replace(TRAIN, max_steps=1)), str(folder / "x"))
    config = replace(config, reward=RewardSourceConfig(weights=(1.0, 0.5)))
    result = fastalign.train_online_dpo(
        config,
        model=str(folder / "llama"),
        train_data=[{"prompt": f"The {word}"} for word in WORDS],
        reward=[
            lambda completions: [float(len(text)) for text in completions],
            lambda completions: [2.0 * len(text) for text in completions],
        ],
    )
    first, second = (result.metrics[0][f"rewards/{name}/mean"] for name in ("lambda", "lambda-2"))
    assert second == 2 * first > 0
    assert result.metrics[0]["reward"] == pytest.approx(2 * first)


def test_an_error_of_a_reward_names_it(folder: Path) -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("no such key")

    config = without_paths(online_config(folder, "x"), str(folder / "x"))
    with pytest.raises(UserCodeFailed, match=r"broken: reward: the code raised KeyError"):
        fastalign.train_online_dpo(
            config,
            model=str(folder / "llama"),
            train_data=[{"prompt": "The"}],
            reward=partial(broken),
        )


def weights_of(result: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = result.model.state_dict()
    return found


def test_a_loop_with_a_loss_of_ones_own(folder: Path) -> None:
    rows = rows_of(str(folder / "pairs.jsonl"))
    seen: list[int] = []

    def loop(name: str, loss: Any) -> Any:
        config = without_paths(dpo_config(folder, name, max_steps=4), str(folder / name))
        with fastalign.dpo_run(
            replace(config, train=replace(config.train, eval_every=2)),
            train_data=rows,
            eval_data=rows,
            **model_and_tokenizer(folder),
        ) as run:
            assert run.num_steps == 4
            for step in run.steps():
                step.finish(run.optimise(run.gradient(step.indices, loss)))
                seen.append(step.number)
                if step.evaluates:
                    step.log(run.evaluate(loss))
        return run.result

    config = replace(dpo_config(folder, "hinge", max_steps=4), loss=LOSSES["hinge"](beta=0.3))
    expected = fastalign.train_dpo(replace(config, train=replace(config.train, eval_every=2)))
    found = loop("by-formula", formula(hinge, beta=0.3))
    assert seen == [1, 2, 3, 4]
    assert found.finished
    ends = [weights_of(expected), weights_of(found)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [row["loss"] for row in found.metrics] == [row["loss"] for row in expected.metrics]
    assert found.metrics[1]["eval_loss"] == expected.metrics[1]["eval_loss"]

    def written_out(pairs: PairLogprobs) -> torch.Tensor:
        chosen, rejected, old_chosen, old_rejected = pairs.logprobs()
        return torch.relu(1 - 0.3 * ((chosen - old_chosen) - (rejected - old_rejected)))

    by_hand = loop("by-hand", written_out)
    for name, value in weights_of(by_hand).items():
        torch.testing.assert_close(value, ends[0][name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="pair_loss: expected a function of pairs"):
        loop("bare", dpo)


def test_a_loop_that_ends_early_or_forgets_a_step(folder: Path) -> None:
    def opened(name: str) -> Any:
        return fastalign.sft_run(
            replace(sft_config(folder, name, max_steps=4), run=RunConfig(dir=str(folder / name)))
        )

    with opened("left") as run:
        for step in run.steps():
            step.finish(run.optimise(run.gradient(step.indices)))
            if step.number == 2:
                break
    assert (run.result.step, run.result.finished) == (2, False)
    assert (folder / "left/checkpoints/step-000002").is_dir()
    with opened("stopped") as run:
        for step in run.steps():
            step.finish(run.optimise(run.gradient(step.indices)))
            run.stop("enough")
    assert (run.result.step, run.result.exit_code) == (1, 3)

    def forgetful() -> None:
        with opened("forgotten") as run:
            for step in run.steps():
                run.optimise(run.gradient(step.indices))

    with pytest.raises(ValueError, match=r"step 1: expected step.finish\(metrics\) before its end"):
        forgetful()


def test_loops_of_the_other_algorithms(folder: Path) -> None:
    """They are those of the training functions."""
    loops = {"reward": reward_config, "ppo": ppo_config, "online_dpo": online_config}
    for algorithm, make in loops.items():
        config = make(folder, algorithm, max_steps=1)
        with getattr(fastalign, f"{algorithm}_run")(config) as run:
            for step in run.steps():
                if algorithm == "reward":
                    metrics = run.optimise(run.gradient(step.indices))
                else:
                    metrics = run.update(step.indices)
                step.finish(metrics)
                step.log({"mine": 3.0} | run.evaluate())
        assert run.result.finished
        assert run.result.metrics[0]["mine"] == 3.0
        assert any(name.startswith("eval_") for name in run.result.metrics[0])


def of_ranks(folder: Path) -> None:
    """Train on this rank; rank 1 then has other rows."""
    from fastalign.ranks.world import world_of_environment

    rank = world_of_environment().rank
    rows = rows_of(str(folder / "texts.jsonl"))
    config = replace(sft_config(folder, "ranks", max_steps=STEPS), model=ModelConfig())
    config = without_paths(config, str(folder / "ranks"))
    objects = model_and_tokenizer(folder)
    result = fastalign.train_sft(config, train_data=rows, **objects)
    assert len(result.metrics) == STEPS
    print("trained", sum(value.double().sum().item() for value in weights_of(result).values()))
    if rank:
        rows = rows[1:]
    config = replace(config, run=RunConfig(dir=str(folder / "differing")))
    try:
        fastalign.train_sft(config, train_data=rows, **objects)
    except ValueError as error:
        print(f"refused: {error}", flush=True)


def test_ranks_hand_over_the_same_objects(folder: Path) -> None:
    config = sft_config(folder, "alone", max_steps=STEPS)
    fastalign.train_sft(replace(config, data=replace(config.data, eval=None)))
    ranks = rank_processes.start(2, folder / "logs", of_ranks, folder)
    ranks.join()
    alone, together = (read_metrics(folder / name) for name in ("alone", "ranks"))
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone])
    outputs = [ranks.output(rank) for rank in range(2)]
    sums = [line for text in outputs for line in text.splitlines() if line.startswith("trained")]
    assert sums[:1] == sums[1:2] or len(sums) == 1  # rank 1's own output is not shown in a run
    assert "refused: the training data of rank 1 differs from rank 0's" in outputs[0]


def generated() -> Iterator[dict[str, str]]:
    yield from ({"text": f"The {word}"} for word in WORDS)


def test_rows_that_come_once_are_read_as_often_as_needed(folder: Path) -> None:
    config = RewardConfig(train=replace(TRAIN, max_steps=1))
    rows = [
        {"prompt": "The", "response_a": f" {a}", "response_b": f" {b}", "label": label}
        for a, b, label in zip(WORDS[1:], WORDS, ["a", "b", "tie"] * 4, strict=False)
    ]
    config = replace(config, data=replace(config.data, ties="drop"))
    result = fastalign.train_reward(
        config,
        model=str(folder / "llama"),
        train_data=iter(rows),
        eval_data=(row for row in rows),  # read again for the ties that are dropped in training
    )
    judged = rows_of(str(result.folder / "eval/pairs.jsonl"))
    assert [row["tie"] for row in judged] == [row["label"] == "tie" for row in rows]
    found = fastalign.train_sft(
        SFTConfig(train=replace(TRAIN, max_steps=1)),
        model=str(folder / "llama"),
        train_data=generated(),
    )
    assert found.finished
