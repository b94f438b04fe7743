"""Reward models as adapters: scores, gradients, what is written, who opens it, resuming."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fastalign.batch.packed import pack
from fastalign.cli.main import main
from fastalign.compute import PACKINGS, Compute
from fastalign.data.tokenizer import load_tokenizer
from fastalign.evaluation.rewards import ModelReward
from fastalign.models.load import load_policy, load_reward_model
from fastalign.models.lora import merge_adapter, quiet_peft
from fastalign.models.lora_files import open_adapter, save_adapter
from fastalign.models.reward import response_reward
from fastalign.runs.config import LoraConfig
from fastalign.trainers import RewardConfig, train_reward
from tests.models.test_exactness import random_groups
from tests.small_runs import (
    WORDS,
    read_metrics,
    reward_config,
    saved_tensors,
    write_rows,
)
from tests.tiny import put_adapter, tiny_reward_model

LORA = LoraConfig(rank=4, alpha=8.0)
GROUPS = random_groups()
PROMPTS = [f"The {word}" for word in WORDS[:6]]
ANSWERS = [f" is {word} and {WORDS[0]}" for word in WORDS[:6]]


def lora_config(folder: Path, run: str, lora: LoraConfig = LORA, **train: Any) -> RewardConfig:
    config = reward_config(folder, run, **train)
    return replace(config, model=replace(config.model, lora=lora))


def eager_rewards(model: Any) -> torch.Tensor:
    """The served scores of GROUPS, one sequence at a time, by transformers' own forward."""
    rows = [[*group.prompt_ids, *ids] for group in GROUPS for ids in group.response_ids]
    return torch.cat([model(torch.tensor([row])).logits.flatten() for row in rows])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_and_gradients_equal_one_sequence_at_a_time(architecture: str, packing: Any) -> None:
    model = put_adapter(tiny_reward_model(architecture, dtype=torch.float64))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "score.weight" for name in trained)
    assert "score.weight" in trained
    weights = torch.linspace(-1, 1, sum(len(group.response_ids) for group in GROUPS)).double()
    expected = eager_rewards(model).double()
    wanted = torch.autograd.grad((weights * expected).sum(), list(trained.values()))
    batch = pack(GROUPS, share_prompts=packing != "packed")
    found = response_reward(model, batch, Compute(packing=packing)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((weights * found).sum(), list(trained.values()))
    for name, ours, theirs in zip(trained, gradients, wanted, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("base", ["float32", "bf16", "nf4"])
def test_the_base_stays_and_adapter_and_head_learn(folder: Path, base: Any) -> None:
    precision = {"precision": "bf16"} if base == "bf16" else {}
    lora = replace(LORA, base=base)
    config = lora_config(folder, "run", lora, max_steps=30, **precision)
    assert train_reward(replace(config, optim=replace(config.optim, lr=1e-2))).finished
    rows = read_metrics(folder / "run")
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["eval_accuracy"] == 1.0
    adapter = load_file(folder / "run/adapter/adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in adapter.values())
    if base == "float32":
        before = load_file(folder / "llama/model.safetensors")
        after = load_file(folder / "run/model/model.safetensors")
        changed = {
            name for name in before.keys() & after.keys() if not after[name].equal(before[name])
        }
        assert changed == {name for name in before if name.endswith("_proj.weight")}
    # what is written scores as the run's own evaluation did
    measured = json.loads((folder / "run/eval/eval.json").read_text())
    assert measured["accuracy"] == 1.0
    batch = pack(GROUPS)
    alone = load_reward_model(folder / "run/adapter", keep_adapter=True, nf4=base == "nf4")
    with torch.no_grad():  # on the base that it was trained on
        scores = response_reward(alone, batch, Compute())
        merged = response_reward(load_reward_model(folder / "run/model"), batch, Compute())
    near = 0.1 if base == "bf16" else 1e-4
    torch.testing.assert_close(merged, scores, rtol=0, atol=near)
    assert scores.std() > 0.1
    # an adapter alone is opened on a base of the format that it was trained on
    file = folder / "run/adapter/base_format.json"
    assert json.loads(file.read_text()) == {"format": base.replace("bf16", "bfloat16")}
    if base != "bf16":
        out = str(folder / "merged")
        assert main(["merge", "--model.path", str(folder / "run/adapter"), "--out", out]) == 0
        found = [
            ModelReward(folder / part)(PROMPTS, ANSWERS)
            for part in ("run/adapter", "run/model", "merged")
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-4)
        assert found[2] == pytest.approx(found[1], abs=1e-4)
    if base == "nf4":
        file.unlink()
        other = ModelReward(folder / "run/adapter")(PROMPTS, ANSWERS)
        assert other != pytest.approx(found[1], abs=1e-3)


def test_an_adapter_on_nf4_without_bitsandbytes_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(put_adapter(load_reward_model(folder / "llama")), folder / "adapter")
    (folder / "adapter/base_format.json").write_text(json.dumps({"format": "nf4"}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"nf4 needs bitsandbytes: pip install .* \(for .*adapter\)$"
    with pytest.raises(ValueError, match=message):
        load_reward_model(folder / "adapter")


def test_commands_take_the_adapter_in_place_of_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_reward(lora_config(folder, "run", max_steps=3))
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    rows = [
        {"prompt": prompt, "completion": text, "sample": number}
        for prompt in PROMPTS
        for number, text in enumerate(ANSWERS[:3])
    ]
    samples = str(write_rows(folder / "samples.jsonl", rows))
    policy, sampling = str(folder / "llama"), ["--sampling.max-new-tokens", "4"]
    found: dict[str, list[Any]] = {"adapter": [], "model": []}
    for part, of_part in found.items():
        path, to = str(folder / "run" / part), folder / f"with-{part}"
        to.mkdir()
        out = [str(to / f"{name}.json") for name in ("eval", "win", "scored", "made")]
        models = ["--model.path", policy, "--reference.path", policy]
        words = ["--reward", path, "--data.prompts", str(prompts), *sampling]
        assert main(["eval", *models, *words, "--out", out[0]]) == 0
        of_part.append(json.loads(Path(out[0]).read_text())["reward"])
        sides = ["--model.path", policy, "--baseline.samples", samples]
        words += ["--sampling.num-samples", "3"]
        assert main(["win-rate", *sides, *words, "--out", out[1]]) == 0
        verdicts = Path(out[1]).with_suffix(".verdicts.jsonl").read_text().splitlines()
        of_part.extend(json.loads(row)["model_reward"] for row in verdicts)
        given = ["--data.samples", samples]
        assert main(["score", "--model.path", path, *given, "--out", out[2]]) == 0
        of_part.extend(json.loads(row)["reward"] for row in Path(out[2]).read_text().splitlines())
        assert main(["label-by-reward", "--reward", path, *given, "--out", out[3]]) == 0
        of_part.extend(json.loads(row)["margin"] for row in Path(out[3]).read_text().splitlines())
    assert found["adapter"] == pytest.approx(found["model"], rel=1e-4, abs=1e-4)
    assert len(found["model"]) > 3 * len(PROMPTS)
    # where a policy is expected, it is refused in one line
    capsys.readouterr()
    adapter = str(folder / "run/adapter")
    generate = ["generate", "--data.prompts", str(prompts), "--out", str(folder / "none.jsonl")]
    compare = ["compare", "--out", str(folder / "c.db"), "--data.prompts", str(prompts)]
    compare += ["--b", policy]
    for words in ([*generate, "--model.path", adapter], [*compare, "--a", adapter]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.endswith(f"expected a causal model, {adapter} is the adapter of a reward model")


def test_peft_opens_it_with_the_same_scores(folder: Path) -> None:
    train_reward(lora_config(folder, "run", max_steps=3))
    base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=1)
    with quiet_peft():
        theirs = PeftModel.from_pretrained(base, folder / "run/adapter")
    raw = ModelReward(folder / "run/adapter", raw=True)
    ours = eager_rewards(raw.model)
    torch.testing.assert_close(eager_rewards(theirs), ours, rtol=1e-4, atol=1e-4)
    saved = json.loads((folder / "run/adapter/reward_config.json").read_text())
    config = json.loads((folder / "run/model/config.json").read_text())
    assert saved == {name: config[name] for name in saved}
    assert saved.keys() == {"pad_token_id", "reward_mean", "reward_std", "tie_model", "tie_nu"}
    normalised = ModelReward(folder / "run/adapter")(PROMPTS, ANSWERS)
    scale = (saved["reward_mean"], saved["reward_std"])
    expected = [(score - scale[0]) / scale[1] for score in raw(PROMPTS, ANSWERS)]
    assert normalised == pytest.approx(expected, rel=1e-5)


def test_an_adapter_that_peft_wrote_scores(folder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=1)
    lora = PeftConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    with quiet_peft():
        theirs = get_peft_model(base, lora)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(std=0.3)
        theirs.save_pretrained(folder / "adapter")
    load_tokenizer(folder / "llama").save_pretrained(folder / "adapter")
    ours = load_reward_model(folder / "adapter", fresh_head=False)
    torch.testing.assert_close(eager_rewards(ours), eager_rewards(theirs), rtol=1e-4, atol=1e-4)
    out = str(folder / "merged")
    assert main(["merge", "--model.path", str(folder / "adapter"), "--out", out]) == 0
    merged = ModelReward(out)(PROMPTS, ANSWERS)
    assert merged == pytest.approx(ModelReward(folder / "adapter")(PROMPTS, ANSWERS), abs=1e-4)


def test_a_pad_token_that_the_base_lacks_is_there_again(tmp_path: Path) -> None:
    from fastalign.models.reward import set_pad_token

    tiny_reward_model("llama").save_pretrained(tmp_path / "base")
    model = put_adapter(load_reward_model(tmp_path / "base"))
    num_rows = len(model.get_input_embeddings().weight)
    set_pad_token(model, num_rows)
    assert not model.get_input_embeddings().weight.requires_grad
    save_adapter(model, tmp_path / "adapter")
    again = load_reward_model(tmp_path / "adapter")
    assert again.config.pad_token_id == num_rows
    merge_adapter(model)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    entries = tmp_path / "adapter/reward_config.json"
    entries.write_text(json.dumps({"pad_token_id": num_rows + 1}))
    with pytest.raises(ValueError, match=r"reward_config.json: expected a token id .* got 98$"):
        load_reward_model(tmp_path / "adapter")


def test_merge_writes_the_model_of_the_run(folder: Path) -> None:
    train_reward(lora_config(folder, "run", replace(LORA, save_merged=False), max_steps=2))
    assert not (folder / "run/model").exists()
    path, out = str(folder / "run/adapter"), str(folder / "merged")
    assert main(["merge", "--model.path", path, "--out", out]) == 0
    train_reward(lora_config(folder, "again", max_steps=2))
    weights = [
        load_file(each / "model.safetensors")
        for each in (folder / "merged", folder / "again/model")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-6, atol=1e-6)
    assert ModelReward(out)(PROMPTS, ANSWERS) == pytest.approx(
        ModelReward(folder / "again/model")(PROMPTS, ANSWERS), abs=1e-4
    )
    with pytest.raises(ValueError, match=r"run/adapter is the adapter of a reward model"):
        load_policy(path)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_a_stopped_and_resumed_run_equals_a_straight_one(folder: Path, base: Any) -> None:
    lora = replace(LORA, base=base)
    train_reward(lora_config(folder, "straight", lora))
    train_reward(lora_config(folder, "stopped", lora, stop_at_step=3))
    train_reward(lora_config(folder, "stopped", lora, resume=True))
    for part in ("adapter/adapter_model", "model/model"):
        first, second = (
            load_file(folder / run / f"{part}.safetensors") for run in ("straight", "stopped")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    of_runs = [
        (folder / run / "adapter/reward_config.json").read_text() for run in ("straight", "stopped")
    ]
    assert of_runs[0] == of_runs[1]
    held = saved_tensors(folder / "stopped/checkpoints/step-000008", "model.")
    assert {"score.weight", "log_nu"} < held.keys()
    assert all("lora_" in name for name in held.keys() - {"score.weight", "log_nu"})


def test_another_model_s_adapter_is_one_line(tmp_path: Path) -> None:
    tiny_reward_model("llama").save_pretrained(tmp_path / "base")
    save_adapter(put_adapter(load_reward_model(tmp_path / "base")), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    assert config["modules_to_save"] == ["score"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    other = tiny_reward_model("gpt2")
    with pytest.raises(ValueError, match=r"adapter in .* cannot be used: Target modules"):
        open_adapter(other, tmp_path / "adapter")
    file.write_text(json.dumps(config | {"modules_to_save": ["embed_tokens"]}))
    with pytest.raises(ValueError, match=r"without modules_to_save, .* got \['embed_tokens'\]"):
        load_reward_model(tmp_path / "adapter")
