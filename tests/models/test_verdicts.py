"""What a small copy of a model shows: packed, padded or refused, and how loading takes it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, Phi3Config

from fastalign.batch.packed import Group, pack
from fastalign.choices import Packing
from fastalign.cli.doctor import model_lines
from fastalign.compute import Compute
from fastalign.models import exactness, head
from fastalign.models.attention import blocks, native
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.exactness import Verdict, check_exact, measure, small_config, verdict
from fastalign.models.forward import check_same_start, response_logprob
from fastalign.models.load import choose_packing, load_policy
from fastalign.ranks.world import World
from fastalign.runs.inputs import checkpoint_activations
from tests.models.test_exactness import gradients, random_groups
from tests.tiny import AS_PACKED, SETTINGS, tiny_model

LLAMA = LlamaConfig(num_hidden_layers=2)


def measured(model_type: str, *, reward: bool = False, **settings: Any) -> Verdict:
    return measure(small_config(CONFIG_MAPPING[model_type](**settings)), reward=reward)


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(exactness, "_known", {})
    return tmp_path / "cache/fastalign/exactness"


@pytest.mark.parametrize(
    ("model_type", "needs"),
    [("mistral", ()), ("gemma2", ("softcap",)), ("gpt_oss", ("sinks",)), ("gemma4_text", ())],
)
def test_packed_where_it_is_exact(model_type: str, needs: tuple[str, ...]) -> None:
    found = measured(model_type)
    assert (found.kind, found.needs) == ("packed", needs)
    assert found.attends == found.layers >= 2
    assert found.difference < 1e-4


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("phi", {"partial_rotary_factor": 0.4, "hidden_size": 2560}),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 256, "hidden_size": 1152}),
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        (
            "deepseek_v3",
            {
                "rope_parameters": {
                    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 1.0},
                    **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
                }
            },
        ),
    ],
)
def test_settings_that_models_have_are_packed(model_type: str, settings: dict[str, Any]) -> None:
    found = measured(model_type, **settings)
    assert (found.kind, found.decodes) == ("packed", True)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        # its layers drop their keywords
        ("stablelm", "no attention layer uses .* plan; .* values differ .* by up to"),
        ("mamba", "no attention layer uses"),
        ("qwen3_next", "values differ .* by up to"),  # a recurrent state
        ("llama4_text", "values differ .* by up to"),  # chunks
    ],
)
def test_padded_where_that_alone_is(model_type: str, why: str) -> None:
    found = measured(model_type)
    assert found.kind == "padded"
    assert re.search(why, found.packed)


def test_what_is_computed_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, by_kernel = blocks.Block.bias, native.attend

    def without_window(*rows: Any) -> torch.Tensor:
        *others, form = rows
        return by_kernel(*others, replace(form, window=None))

    monkeypatch.setattr(native, "attend", without_window)
    monkeypatch.setattr(
        blocks.Block,
        "bias",
        lambda self, queries, keys, window, dtype: right(self, queries, keys, None, dtype),
    )
    monkeypatch.setattr(blocks.Block, "first_key", lambda self, query, window: 0)
    assert measured("mistral").kind == "padded"  # windows are passed over in packed rows
    monkeypatch.undo()
    monkeypatch.setattr(head, "SOFTCAPS", ())
    found = measured("gemma2")
    assert found.kind == "refused"
    assert "values differ" in found.padded


def test_reward_models_have_a_verdict_of_their_own() -> None:
    assert measured("mistral", reward=True).kind == "packed"
    assert measured("olmoe", reward=True).kind == "refused"  # transformers has no such classifier


def test_a_verdict_is_remembered_by_configuration_and_versions(
    forgotten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    first = verdict(LLAMA, reward=False)
    assert torch.equal(torch.get_rng_state(), state)
    (file,) = forgotten.iterdir()
    monkeypatch.setattr(exactness, "_known", {})
    monkeypatch.setattr(exactness, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert verdict(LlamaConfig(num_hidden_layers=9, hidden_size=512), reward=False) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(forgotten.parents[1]))
    monkeypatch.setattr(exactness, "_known", {})
    text = file.read_text()
    file.write_text(text[:20])  # damaged: measured and written again
    assert verdict(LLAMA, reward=False) == first
    assert file.read_text() == text


def test_other_ranks_remember_what_the_first_measured(
    forgotten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LLAMA.save_pretrained(tmp_path / "model")
    found = AS_PACKED
    monkeypatch.setattr(World, "first_does", lambda self, work: ("shared_prefix", {"a": found}))
    assert choose_packing("auto", [str(tmp_path / "model")]) == "shared_prefix"
    assert exactness.known_verdicts() == {"a": found}


def test_auto_takes_padded_and_packed_is_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG_MAPPING["stablelm"](
        **SETTINGS["gpt_neox"], num_key_value_heads=4, vocab_size=97
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'stablelm' cannot be packed exactly: .* differ from"):
        load_policy(tmp_path)
    choices: tuple[Any, ...] = ("auto", "packed")
    chosen = [choose_packing(choice, [str(tmp_path)]) for choice in choices]
    assert chosen == ["padded", "packed"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"packing: padded, since {tmp_path} cannot be packed exactly: ")
    assert load_policy(tmp_path, Compute(packing="padded")).config.model_type == "stablelm"
    text = "\n".join(model_lines(str(tmp_path), trust_remote_code=False))
    assert "causal model  padded: " in text
    assert "plan: 0 in 2 layers" in text


def test_a_model_that_is_wrong_in_both_layouts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(AS_PACKED, packed="packed wrong", padded="its values differ by 0.2")
    monkeypatch.setattr(exactness, "verdict", lambda *_, **__: wrong)
    with pytest.raises(ValueError, match=r"'llama' cannot be computed exactly: its values differ"):
        check_exact(LLAMA, "padded", reward=False)


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_rope_with_two_ranges_is_exact_in_each_and_refused_across(packing: Packing) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    many = {**rope, "short_factor": [1.0] * 48, "long_factor": [1.0 + 0.1 * n for n in range(48)]}
    assert measured("phi3", rope_parameters=many).kind == "packed"
    torch.manual_seed(0)
    config = Phi3Config(
        **SETTINGS["gpt_neox"],
        vocab_size=97,
        pad_token_id=0,
        rope_parameters=rope,
        original_max_position_embeddings=8,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastalign_blocks").eval()
    compute = Compute(packing=packing)
    for groups in ([Group([1], [[3] * 4, [5]])], [Group([1], [[3] * 9, [5] * 12])]):
        response_logprob(model, pack(groups), compute)
    mixed = pack([Group([1], [[3] * 4]), Group([1], [[5] * 12])])
    with pytest.raises(ValueError, match="sequences of 5 to 13 tokens cannot share a batch"):
        response_logprob(model, mixed, compute)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 48}),
        (
            "phimoe",
            {"input_jitter_noise": 0.5, "num_key_value_heads": 2},
        ),
    ],
)
def test_checkpointing_brings_no_dropout_or_jitter_back(
    model_type: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, model_type, {**SETTINGS["gpt_neox"], **settings})
    model, batch = tiny_model(model_type), pack(random_groups())
    plain = gradients(model, response_logprob(model, batch, Compute()))
    model.train()  # somebody's own loop
    model.eval()
    checkpoint_activations(model)
    assert any(module.training for module in model.modules())
    logprob = response_logprob(model, batch, Compute())
    torch.testing.assert_close(logprob, response_logprob(model.eval(), batch, Compute()))
    checkpoint_activations(model)
    for name, gradient in gradients(model, response_logprob(model, batch, Compute())).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[name], msg=name)


def test_a_policy_that_differs_from_its_reference_at_the_start_is_found() -> None:
    reference = torch.tensor([-3.0, -40.0])
    check_same_start(reference + 1e-3, reference, [4, 9], Compute())
    with pytest.raises(ValueError, match=r"-40\.1 under the one and -40 .*explains 0\.006\)"):
        check_same_start(reference - torch.tensor([0.0, 0.1]), reference, [4, 9], Compute())


def test_the_plan_is_counted() -> None:
    model, batch = tiny_model("llama"), pack(random_groups())
    plan = AttentionPlan(batch)
    response_logprob(model, batch, Compute(), plan)
    assert plan.num_attended == 2
