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


def config_of(folder: Path, source: str | None, **changes: Any) -> PPOConfig:
    config = ppo_config(folder, "run", precision="float32")
    more = () if source is None else (source,)
    reward = replace(config.reward, sources=(*config.reward.sources, *more))
    ppo = replace(config.ppo, ptx_data=None, **changes.pop("ppo", {}))
    value = replace(config.value, **changes.pop("value", {}))
    model = replace(config.model, lora=changes.pop("lora", LoraConfig()))
    return replace(config, model=model, reward=reward, ppo=ppo, value=value, **changes)


def held_bytes(config: PPOConfig) -> tuple[int, int, int]:
    """Bytes of all models of a run, each tensor once; weights that are trained, and the value's."""
    run = prepare_ppo(config, make_compute(config.train))
    models = [run.models.policy, run.models.reference, run.models.value]
    models += [f.model for f in run.sources.functions if hasattr(f, "model")]
    tensors = {id(t): t for m in models if m is not None for t in (*m.parameters(), *m.buffers())}
    own = None if run.models.shares_trunk else run.models.value
    trained, of_value = (
        sum(p.numel() for p in ([] if m is None else m.parameters()) if p.requires_grad)
        for m in (run.models.trained, own)
    )
    return sum(t.numel() * t.element_size() for t in tensors.values()), trained, of_value


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
        (None, {"lora": LORA, "ppo": {"one_base": True}}),
    ],
    ids=[
        *("four models", "rloo", "shared", "lora", "adapter", "one base", "one base, shared"),
        "one base, new values",
    ],
)
def test_weights_and_states_are_those_that_a_run_holds(
    folder: Path, rewards: dict[str, str], source: str | None, changes: dict[str, Any]
) -> None:
    config = config_of(folder, rewards.get(source or ""), **changes)
    found = estimate_ppo(config)
    weights, trained, of_value = held_bytes(config)
    buffers = 64  # of rotary frequencies, which models on one base share
    for peak in found.phases.values():
        assert peak.weights == pytest.approx(weights, abs=4 * buffers)
        assert peak.states == pytest.approx(8 * trained, abs=8 * 32)
    assert found.num_trained == trained
    has_value = config.ppo.advantage.needs_value and not config.value.share_policy
    assert ("value update" in found.phases) == has_value
    # the value's gradients are there while the policy's are computed
    assert 4 * of_value <= found.phases["policy update"].gradients <= 4 * trained


def test_sampling_holds_keys_values_and_logits(folder: Path, rewards: dict[str, str]) -> None:
    """By hand: 4 prompts at a time, 2 answers each of up to 5 tokens, 2 layers, 320 words."""
    config = config_of(folder, rewards["whole"])
    run = prepare_ppo(config, make_compute(config.train))
    lengths = sorted(map(len, run.prompts.prompt_ids))[-4:]
    text = run.models.policy.config
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    keys_and_values = 2 * text.num_hidden_layers * width * 4 * (sum(lengths) + 8 * 5)
    logits = 3 * 4 * 8 * text.vocab_size
    found = estimate_ppo(config).phases["sampling"].activations
    assert found == keys_and_values + logits


def test_the_copy_of_a_checkpoint_is_held_while_the_next_answers_are_sampled(folder: Path) -> None:
    def saving(**train: Any) -> int:
        config = config_of(folder, None)
        changed = replace(config, train=replace(config.train, save_minutes=0, **train))
        found = estimate_ppo(changed)
        assert found.phases["policy update"].saving == 0
        copied, whole = found.phases["sampling"].saving, 12 * found.num_trained
        assert copied in (0, whole)
        return copied

    assert saving() == saving(save_every=2, async_checkpoints=False) == 0
    assert saving(save_every=2) > 0
    assert saving(best_metric="eval_reward", eval_every=1) > 0


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
