"""A model in memory is opened as its folder is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastalign.compute import Compute
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from fastalign.in_memory import GivenModel
from fastalign.models.load import load_policy, load_reward_model, model_fingerprint
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

# Tied heads, biases, fused experts, heads of another width; Conv1D.
ARCHITECTURES = ("llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3")
PADDED = Compute(packing="padded")


def saved(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model as transformers opens it from a folder."""
    model = tiny_model(architecture, vocab_size=320)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_same(found: Any, expected: Any) -> None:
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name
    assert model_fingerprint(found) == model_fingerprint(expected)
    assert found.save_dtype == expected.save_dtype
    assert found.config.to_json_string() == expected.config.to_json_string()
    shared = {p.data_ptr() for p in found.parameters()}
    assert len(shared) == len({p.data_ptr() for p in expected.parameters()})  # tied alike


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_it_is_the_model_of_its_folder(load: Any, architecture: str, tmp_path: Path) -> None:
    if load is load_reward_model and architecture in ("gpt_oss", "deepseek_v3"):
        pytest.skip("another test has its reward model")
    model = saved(tmp_path, architecture)
    given = GivenModel("model", model)
    found, expected = load(given, PADDED), load(tmp_path, PADDED)
    assert_same(found, expected)
    if load is load_policy:
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    places = {p.data_ptr() for p in model.parameters()}
    assert not places & {p.data_ptr() for p in found.parameters()}  # a copy


def test_its_dtype_is_that_of_the_model_that_is_written(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", torch.bfloat16)
    found = load_policy(GivenModel("model", model), PADDED)
    assert found.dtype == torch.float32
    assert found.save_dtype == torch.bfloat16


def test_what_was_changed_in_memory_counts(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.generation_config.eos_token_id = [2, 5]
    given = GivenModel("model", model)
    found = load_policy(given, PADDED)
    assert found.generation_config.eos_token_id == [2, 5]
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    tokenizer = load_tokenizer(given)
    assert eos_token_ids(tokenizer, given) == tuple(sorted({2, 5, tokenizer.eos_token_id}))
    assert found.name_or_path == str(tmp_path)  # where its card says that it is from
    with torch.no_grad():
        model.model.embed_tokens.weight[3].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"'model \(in memory\)' are damaged: model.embed_tokens"):
        load_policy(given, PADDED)


def test_a_head_that_is_no_longer_tied_is_refused_as_in_a_folder(tmp_path: Path) -> None:
    model = saved(tmp_path, "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"ties lm_head.weight to .*: the two differ"):
        load_policy(GivenModel("model", model), PADDED)


def test_a_tokenizer_of_ones_own_beside_a_path(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    given = GivenModel("model", None, tokenizer, path=str(tmp_path))
    found = load_tokenizer(given)
    assert found.chat_template == tokenizer.chat_template
    assert found is not tokenizer  # a reward model adds a pad token to its own
    assert_same(load_policy(given, PADDED), load_policy(tmp_path, PADDED))
