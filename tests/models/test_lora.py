"""A model with an adapter, beside transformers' and peft's own numbers for it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastalign.batch.packed import Group, pack
from fastalign.compute import PACKINGS, Compute
from fastalign.models.forward import hidden_and_head, response_logprob
from fastalign.models.head import check_head, lm_head
from fastalign.models.load import load_policy
from fastalign.models.lora import (
    adapter_counts,
    adapter_off,
    add_adapter,
    base_state,
    merge_adapter,
    quiet_peft,
    target_endings,
)
from fastalign.models.lora_files import save_adapter
from tests.models.test_exactness import one_at_a_time, random_groups
from tests.tiny import SETTINGS, put_adapter, tiny_model
from tests.tolerance import assert_no_worse

TARGETS = {"no_head": ["all-linear"], "with_head": ["all-linear", "lm_head"]}
EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
ADAPTED = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])


def adapter_gradients(model: Any, logprob: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, logprob.numel(), dtype=logprob.dtype)
    model.zero_grad(set_to_none=True)
    (weights * logprob).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in found)
    return found


@ADAPTED
@pytest.mark.parametrize("packing", PACKINGS)
@ARCHITECTURES
def test_logprobs_and_adapter_gradients_equal_one_sequence_at_a_time(
    architecture: str, packing: Any, targets: list[str]
) -> None:
    model = put_adapter(tiny_model(architecture, dtype=torch.float64), *targets)
    groups = random_groups(masked=True)
    expected = one_at_a_time(model, groups)
    expected_gradients = adapter_gradients(model, expected)
    assert any("lm_head" in name for name in expected_gradients) == ("lm_head" in targets)
    batch = pack(groups, share_prompts=packing != "packed")
    actual = response_logprob(model, batch, Compute(packing=packing))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    for name, gradient in adapter_gradients(model, actual).items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=float(scale) * 1e-4, msg=name
        )


@ADAPTED
@ARCHITECTURES
def test_the_head_with_its_adapter_gives_the_models_logits(
    architecture: str, targets: list[str]
) -> None:
    model = put_adapter(tiny_model(architecture), *targets)
    check_head(model)
    batch = pack([Group([3, 4, 5], [[6, 7, 8]])])
    hidden, head = hidden_and_head(model, batch, Compute())
    logits = model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits[0, 2:5]
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-4)
    if head.softcap is None:
        torch.testing.assert_close(head.mean_logit(hidden), logits.mean(-1), rtol=1e-4, atol=1e-4)


@ADAPTED
def test_without_its_adapter_the_model_is_its_base_to_the_bit(targets: list[str]) -> None:
    batch = pack(random_groups())
    model = tiny_model("gpt2")
    before = response_logprob(model, batch, Compute()).detach()
    add_adapter(model, rank=3, alpha=6.0, targets=targets)
    assert torch.equal(response_logprob(model, batch, Compute()), before)  # B is 0
    model = put_adapter(tiny_model("gpt2"), *targets)
    with adapter_off(model):
        assert torch.equal(response_logprob(model, batch, Compute()), before)
    after = response_logprob(model, batch, Compute())
    assert (after - before).abs().max() > 0.1
    assert adapter_gradients(model, after), "the adapter is trained on"


def test_without_an_adapter_there_is_nothing_to_put_off() -> None:
    model = tiny_model("llama")
    with adapter_off(model):
        assert lm_head(model).lora is None


def test_an_adapter_is_float32_on_a_bf16_base_and_its_gradient_no_worse_than_eager() -> None:
    targets = ("lm_head",)  # deeper ones have the noise of transformers' own layers
    model = put_adapter(tiny_model("llama", dtype=torch.bfloat16), *targets)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    groups = random_groups()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob = response_logprob(model, pack(groups), Compute(dtype=torch.bfloat16))
        ours = adapter_gradients(model, logprob)
        eager = adapter_gradients(model, one_at_a_time(model, groups))
    truth = adapter_gradients(model.double(), one_at_a_time(model.double(), groups))
    for name, expected in truth.items():
        assert ours[name].dtype == torch.float32
        scale = float(expected.abs().max())
        assert_no_worse(
            name,
            ours[name],
            eager[name],
            expected,
            dtype=torch.bfloat16,
            length=97,
            scale=scale,
        )


@ARCHITECTURES
def test_gradient_checkpointing_changes_nothing(architecture: str) -> None:
    model = put_adapter(tiny_model(architecture))
    batch = pack(random_groups())
    plain = adapter_gradients(model, response_logprob(model, batch, Compute()))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = adapter_gradients(model, response_logprob(model, batch, Compute()))
    for name, gradient in again.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["layers.1.mlp.up_proj"], ["lm_head"]])
def test_targets_are_endings_of_names(targets: list[str]) -> None:
    model = put_adapter(tiny_model("llama"), *targets)
    adapted = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert adapted
    assert all(name.endswith(tuple(targets)) for name in adapted)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for use_rslora, scaling in ((False, 2.0), (True, 4.0)):
        model = tiny_model("llama")
        add_adapter(model, rank=4, alpha=8.0, targets=["lm_head"], use_rslora=use_rslora)
        lora = lm_head(model).lora
        assert lora is not None
        assert lora.scaling == scaling


@pytest.mark.parametrize("target", ["query", "self_attn", "norm", "embed_tokens", "_proj"])
def test_an_unknown_target_is_one_line_that_says_what_there_is(target: str) -> None:
    message = f"no linear layer's name ends in '{target}'; expected all-linear or among q_proj, "
    with pytest.raises(ValueError, match=message + "k_proj, .*down_proj, lm_head$"):
        add_adapter(tiny_model("llama"), rank=2, alpha=4.0, targets=["q_proj", target])


def test_without_peft_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model\.lora\.rank needs peft: pip install"):
        add_adapter(tiny_model("llama"), rank=2, alpha=4.0, targets=["all-linear"])


@ADAPTED
@ARCHITECTURES
def test_merged_it_is_an_ordinary_model_of_the_same_numbers(
    architecture: str, targets: list[str]
) -> None:
    model = put_adapter(tiny_model(architecture, dtype=torch.float64), *targets)
    names = tiny_model(architecture).state_dict().keys()
    embedding = model.get_input_embeddings().weight.detach().clone()
    batch = pack(random_groups())
    expected = response_logprob(model, batch, Compute())
    merge_adapter(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(
        response_logprob(model, batch, Compute()), expected, rtol=0, atol=1e-10
    )
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_layer_in_a_list_is_named_by_its_list() -> None:
    model: Any = torch.nn.Module()
    model.ffn = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    model.config, model.get_output_embeddings = PreTrainedConfig(), lambda: None
    assert target_endings(model, ["all-linear"]) == (["ffn.0", "ffn.2"], [])


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v3"])
def test_fused_experts_have_adapters_that_are_saved_and_merged(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one layer with experts beside a shared one, whose layers have the names of experts before
    monkeypatch.setitem(SETTINGS, "deepseek_v3", SETTINGS["deepseek_v3"] | EXPERTS)
    model = tiny_model(architecture)
    names, ids = set(model.state_dict()), torch.tensor([[5, 6, 7, 8]])
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    put_adapter(model)
    assert set(base_state(model)) == names
    assert re.search(r"without one: \d,\d+ \([^(]*embed_tokens", counts := adapter_counts(model))
    assert "experts" not in counts
    assert "_proj" not in counts
    adapted = model(ids).logits
    adapted.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet_peft():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    merge_adapter(model)
    for found in (theirs, load_policy(tmp_path / "adapter"), model):
        torch.testing.assert_close(found(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names


def test_fused_experts_alone_are_a_target() -> None:
    model = put_adapter(tiny_model("gpt_oss"), "experts.down_proj")
    assert "gate_up_proj 12,288" in adapter_counts(model)
    with pytest.raises(ValueError, match=r"name ends in 'up'; expected .*, experts\.down_proj"):
        add_adapter(tiny_model("gpt_oss"), rank=2, alpha=2.0, targets=["up"])
