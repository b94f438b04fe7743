"""The estimate of PPO counts each model, and one base once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastalign.cli.main import main
from fastalign.data.tokenizer import load_tokenizer
from fastalign.estimate.ppo import estimate_ppo
from fastalign.models.load import load_reward_model, save_reward_model
from fastalign.models.lora_files import save_adapter
from fastalign.runs.config import LoraConfig
from fastalign.runs.open import make_compute
from fastalign.trainers import ADVANTAGES, PPOConfig
from fastalign.trainers.ppo.setup import prepare_ppo
from tests.small_runs import ppo_config
from tests.tiny import put_adapter, tiny_reward_model

LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture
def rewards(folder: Path) -> dict[str, str]:
    """A whole reward model and an adapter, on the policy's base."""
    tokenizer = load_tokenizer(folder / "llama")
    save_reward_model(tiny_reward_model("llama", vocab_size=320), tokenizer, folder / "whole")
    save_adapter(put_adapter(load_reward_model(folder / "llama")), folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return {name: str(folder / name) for name in ("whole", "adapter")}


def config_of(folder: Path, source: str, **changes: Any) -> PPOConfig:
    config = ppo_config(folder, "run", precision="float32")
    reward = replace(config.reward, sources=(*config.reward.sources, source))
    ppo = replace(config.ppo, ptx_data=None, **changes.pop("ppo", {}))
    value = replace(config.value, **changes.pop("value", {}))
    model = replace(config.model, lora=changes.pop("lora", LoraConfig()))
    return replace(config, model=model, reward=reward, ppo=ppo, value=value, **changes)


def held_bytes(config: PPOConfig) -> tuple[int, int]:
    """Bytes of all models of a run, each tensor once, and of those that are trained."""
    run = prepare_ppo(config, make_compute(config.train))
    models = [run.models.policy, run.models.reference, run.models.value]
    models += [f.model for f in run.sources.functions if hasattr(f, "model")]
    tensors = {id(t): t for m in models if m is not None for t in (*m.parameters(), *m.buffers())}
    trained = [t for t in run.models.trained.parameters() if t.requires_grad]
    return sum(t.numel() * t.element_size() for t in tensors.values()), sum(
        t.numel() for t in trained
    )


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("whole", {}),
        ("whole", {"ppo": {"advantage": ADVANTAGES["rloo"]()}}),
        ("whole", {"value": {"share_policy": True}}),
        ("whole", {"lora": LORA, "value": {"lora_rank": 2}}),
        ("adapter", {"lora": LORA}),
        ("adapter", {"lora": LORA, "ppo": {"one_base": True}}),
        ("adapter", {"lora": LORA, "ppo": {"one_base": True}, "value": {"share_policy": True}}),
    ],
    ids=["four models", "rloo", "shared", "lora", "adapter", "one base", "one base, shared"],
)
def test_weights_and_states_are_those_that_a_run_holds(
    folder: Path, rewards: dict[str, str], source: str, changes: dict[str, Any]
) -> None:
    config = config_of(folder, rewards[source], **changes)
    found = estimate_ppo(config)
    weights, trained = held_bytes(config)
    buffers = 64  # of rotary frequencies, which models on one base share
    for peak in found.phases.values():
        assert peak.weights == pytest.approx(weights, abs=4 * buffers)
        assert peak.states == pytest.approx(8 * trained, abs=8 * 32)
    assert found.num_trained == trained
    has_value = config.ppo.advantage.needs_value and not config.value.share_policy
    assert ("value update" in found.phases) == has_value
    assert 0 <= found.phases["policy update"].gradients <= 4 * trained


def test_one_base_is_much_less_than_four_models(folder: Path, rewards: dict[str, str]) -> None:
    four = estimate_ppo(config_of(folder, rewards["whole"]))
    one = estimate_ppo(config_of(folder, rewards["adapter"], lora=LORA, ppo={"one_base": True}))
    held = [
        f.phases["policy update"].weights + f.phases["policy update"].states for f in (four, one)
    ]
    assert held[1] < 0.45 * held[0]
    base = sum(v.numel() for v in load_file(folder / "llama/model.safetensors").values())
    assert one.num_parameters > base


def test_the_command_prints_the_phases_and_ranks_have_buckets(
    folder: Path, rewards: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, rewards["whole"])
    words = [
        *("--model.path", config.model.path, "--data.train", config.data.train),
        *("--reward.sources", *config.reward.sources, "--run.dir", str(folder / "none")),
        *("--train.max-steps", "2", "--train.device", "cpu", "--ranks", "2"),
        *("--sampling.max-new-tokens", "5"),
    ]
    output = folder / "estimate.json"
    assert main(["estimate", "ppo", *words, "--json", str(output)]) == 0
    text = capsys.readouterr().out
    for phase in ("sampling", "log-probs and values", "value update", "policy update"):
        assert phase in text
    found = json.loads(output.read_text())
    assert found["ranks"] == 2
    assert found["phases"]["sampling"]["buckets_bytes"] == 4 * held_bytes(config)[1]
    assert not (folder / "none").exists()
    with pytest.raises(ValueError, match=r"parallel\.strategy: expected ddp in an estimate of a"):
        estimate_ppo(replace(config, parallel=replace(config.parallel, strategy="fsdp")))
