"""`fastalign estimate`: its parts are exact, and the whole is near the peak of a real run."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.cli.main import main
from fastalign.estimate.run import estimate_run
from tests.rank_processes import CONTEXT
from tests.small_runs import dpo_config, sentence, sft_config, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]


def run_and_tell_peak(arguments: list[str], output: Path) -> None:
    """Run a command in this process, a new one, and write its peak memory in kB."""
    warnings.simplefilter("ignore")
    assert main(arguments) == 0
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    output.write_text(peak)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows beside which the libraries are not everything."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pairs = [
        {
            "prompt": "The" + sentence(n, 50 + n % 30),
            "chosen": sentence(n + 20, 10 + n % 20),
            "rejected": sentence(n + 41, 12 + n % 20),
        }
        for n in range(12)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "texts.jsonl", [{"text": row["prompt"]} for row in pairs])
    return folder


CONFIGURATIONS = {
    "dpo": ("dpo", "pairs", ()),
    "sft, checkpointed, two batches a step": (
        "sft",
        "texts",
        ("--train.tokens-per-batch", "1250", "--train.gradient-checkpointing"),
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_estimate_is_near_the_peak(name: str, large: Path, tmp_path: Path) -> None:
    algorithm, rows, more = CONFIGURATIONS[name]
    words = [
        *(algorithm, "--model.path", str(large / "model"), "--data.max-length", "2000"),
        *("--data.train", str(large / f"{rows}.jsonl"), "--run.dir", str(tmp_path / "run")),
        *("--train.max-steps", "2", "--train.batch-size", "12", "--train.device", "cpu", *more),
    ]
    if algorithm == "dpo":
        words += ["--reference.cache-dir", str(tmp_path / "cache")]
    output = tmp_path / "estimate.json"

    def peak_bytes(*arguments: str) -> int:
        process = CONTEXT.Process(
            target=run_and_tell_peak, args=(list(arguments), tmp_path / "peak")
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        return int((tmp_path / "peak").read_text()) * 1024

    peak_bytes("estimate", *words, "--json", str(output))
    estimated = json.loads(output.read_text())["peak_bytes"]
    assert estimated == pytest.approx(peak_bytes(*words), rel=0.15)


def test_weights_gradients_and_states_are_exact(folder: Path) -> None:
    from fastalign.models.load import load_policy

    found = estimate_run(sft_config(folder, "run", tokens_per_batch=20))
    model = load_policy(folder / "llama")
    num = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    peak = found.phases["training step"]
    assert found.num_parameters == found.num_trained == num
    assert peak.weights == 4 * num + buffers
    assert peak.states == 8 * num
    assert 0 < peak.gradients <= 4 * num
    assert found.num_batches > 1
    assert found.largest == "training step"


def test_a_checkpoint_is_written_from_a_copy_while_training_goes_on(folder: Path) -> None:
    def saving(**train: Any) -> list[int]:
        found = estimate_run(sft_config(folder, "run", **train))
        own = found.phases["training step"]
        assert own.total == own.weights + own.gradients + own.states + own.activations + own.saving
        return [own.saving, 12 * found.num_trained]

    copied, expected = saving(save_every=2)
    assert copied == expected
    assert saving()[0] == saving(save_minutes=0, save_every=2)[0] == expected
    assert saving(save_minutes=0)[0] == saving(save_every=2, async_checkpoints=False)[0] == 0


def test_a_frozen_weight_has_no_gradient_and_no_state(folder: Path) -> None:
    from dataclasses import replace

    from fastalign.runs.config import LoraConfig, ModelConfig

    plain = dpo_config(folder, "run")
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model = ModelConfig(path=plain.model.path, lora=lora)
    found = estimate_run(replace(plain, model=model))
    assert found.num_trained == 2 * (2 * 32 + 2 * 32)  # two layers' A and B
    peak = found.phases["training step"]
    assert peak.states == 8 * found.num_trained
    assert peak.gradients <= 4 * found.num_trained
    low = replace(plain, model=ModelConfig(plain.model.path, lora=replace(lora, base="nf4")))
    assert estimate_run(low).phases["training step"].weights < peak.weights


def test_checkpointing_and_smaller_batches_take_less(folder: Path) -> None:
    def activations(**train: Any) -> int:
        config = dpo_config(folder, "run", batch_size=12, **train)
        return estimate_run(config).phases["training step"].activations

    whole = activations()
    assert activations(gradient_checkpointing=True) < 0.8 * whole
    assert activations(tokens_per_batch=60) < 0.6 * whole


def test_nothing_is_written_and_the_command_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.path", str(folder / "llama"), "--data.train", str(folder / "texts.jsonl")]
    words += ["--run.dir", str(folder / "run"), "--train.device", "cpu"]
    assert main(["estimate", "sft", *words]) == 0
    assert "it fits" in capsys.readouterr().out
    assert not (folder / "run").exists()
    assert main(["estimate", "online-dpo", *words]) == 2
    line = "expected one of sft, dpo, kto, reward, ppo, grpo, rloo, got 'online-dpo'"
    assert line in capsys.readouterr().err
    assert main(["estimate", "--help"]) == 0
    usage = capsys.readouterr().out
    assert "sft, dpo, kto, reward, ppo, grpo or rloo" in usage
    assert max(map(len, usage.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nf4_takes_what_bitsandbytes_allocates(kind: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from dataclasses import replace

    from fastalign.models.load import save_model
    from fastalign.runs.config import LoraConfig, ModelConfig
    from fastalign.runs.inputs import load_for_training
    from fastalign.runs.open import make_compute

    save_model(tiny_model(kind, vocab_size=320), make_tokenizer(), folder / kind)
    config = dpo_config(folder, "run")
    lora = LoraConfig(rank=2, targets=("all-linear", "lm_head"), base="nf4")
    config = replace(config, model=ModelConfig(str(folder / kind), lora=lora))
    model, _ = load_for_training(config, make_compute(config.train))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for scale in (state.absmax, state.state2.absmax):
                tensors[id(scale)] = scale
    expected = sum(t.numel() * t.element_size() for t in tensors.values())
    estimated = estimate_run(config).phases["training step"].weights
    assert estimated == pytest.approx(expected, rel=0.02)


def test_the_evaluation_is_a_phase_and_counts_for_the_reference(folder: Path) -> None:
    from dataclasses import replace

    config = dpo_config(folder, "run", batch_size=2, tokens_per_batch=1000)
    alone = estimate_run(replace(config, data=replace(config.data, eval=None)))
    assert list(alone.phases) == ["training step", "reference log-probs"]
    held_out = folder / "held_out.jsonl"
    long = "The" + sentence(3, 9)
    write_rows(held_out, [{"prompt": long, "chosen": " slow", "rejected": " dim"}] * 16)
    found = estimate_run(replace(config, data=replace(config.data, eval=str(held_out))))
    assert list(found.phases) == ["training step", "reference log-probs", "evaluation"]
    step, evaluation = found.phases["training step"], found.phases["evaluation"]
    assert (evaluation.weights, evaluation.states) == (step.weights, step.states)
    assert evaluation.gradients == 0
    assert evaluation.activations > 0
    of_reference = found.phases["reference log-probs"].activations
    assert of_reference > alone.phases["reference log-probs"].activations
    assert found.phases["training step"] == alone.phases["training step"]


def test_what_a_run_refuses_of_precisions_is_refused(folder: Path) -> None:
    from dataclasses import replace

    from fastalign.runs.config import LoraConfig, ModelConfig

    config = sft_config(folder, "run", precision="float32")
    model = ModelConfig(config.model.path, lora=LoraConfig(rank=2, base="bf16"))
    with pytest.raises(ValueError, match=r"^model.lora.base: a bf16 base computes in bf16"):
        estimate_run(replace(config, model=model))


def test_full_training_from_an_adapter_is_that_of_its_base(folder: Path) -> None:
    from dataclasses import replace

    from fastalign.models.load import load_policy
    from fastalign.models.lora import add_adapter
    from fastalign.models.lora_files import save_adapter
    from fastalign.runs.config import ModelConfig

    config = sft_config(folder, "run")
    model = load_policy(folder / "llama")
    add_adapter(model, rank=2, alpha=4, targets=("q_proj",))
    save_adapter(model, folder / "adapter")
    make_tokenizer().save_pretrained(folder / "adapter")
    found = estimate_run(replace(config, model=ModelConfig(str(folder / "adapter"))))
    assert found == replace(estimate_run(config), libraries=found.libraries)


def test_what_does_not_fit_says_what_would_help(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastalign.cli.estimate.available_bytes", lambda device: 1000)
    words = ["--model.path", str(folder / "llama"), "--data.train", str(folder / "texts.jsonl")]
    assert main(["estimate", "sft", *words, "--run.dir", "x", "--train.device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "it does not fit" in text
    assert "--train.tokens-per-batch" in text
