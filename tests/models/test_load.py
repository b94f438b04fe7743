"""Loading: what is refused, and what the message says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CohereConfig, CohereForCausalLM

from fastalign.batch.packed import Group, pack
from fastalign.compute import Compute
from fastalign.models.forward import hidden_and_head, response_logprob
from fastalign.models.head import check_head, lm_head
from fastalign.models.load import load_policy, load_reward_model, save_model, set_save_dtype
from tests.tiny import tiny_model, tiny_reward_model
from tests.tokenizers import make_tokenizer


def test_a_saved_model_loads_and_agrees(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    batch = pack([Group([1, 2], [[3, 4], [5]])])
    loaded = load_policy(tmp_path)
    assert torch.equal(
        response_logprob(loaded, batch, Compute()),
        response_logprob(model, batch, Compute()),
    )


def dtypes_of(folder: Path) -> tuple[set[torch.dtype], str]:
    weights = load_file(folder / "model.safetensors").values()
    return {v.dtype for v in weights}, json.loads((folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("make", [tiny_model, tiny_reward_model])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 ties its head
def test_a_model_is_written_in_the_dtype_of_its_checkpoint(
    tmp_path: Path, architecture: str, make: Any
) -> None:
    model = make(architecture, vocab_size=320).bfloat16()
    embedding = model.get_input_embeddings().weight
    next(p for p in model.parameters() if p.numel() < 100).data = torch.ones(32)  # one in float32
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in/config.json").write_text(
        (tmp_path / "in/config.json").read_text().replace("bfloat16", "float32")
    )
    load = load_policy if make is tiny_model else load_reward_model
    loaded = load(tmp_path / "in")
    for name, dtype in (
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
    ):
        set_save_dtype(loaded, name)
        save_model(loaded, make_tokenizer(), tmp_path / name)
        assert dtypes_of(tmp_path / name) == ({dtype}, str(dtype).removeprefix("torch."))
        again = load(tmp_path / name)
        assert torch.equal(again.get_input_embeddings().weight, embedding.to(dtype).float())
        before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", name))
        assert before.keys() == after.keys()  # a tied head is written once
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_a_weight_that_the_written_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=320)
    model.get_input_embeddings().weight.data[3, 4] = 70000.0
    model.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    set_save_dtype(loaded, "float16")
    with pytest.raises(ValueError, match=r"model\.save_dtype: .*embed_tokens.* holds 70000"):
        save_model(loaded, make_tokenizer(), tmp_path / "out")


def test_the_logits_of_a_scaled_head_are_the_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path)
    model = load_policy(tmp_path, Compute(packing="padded"))
    assert lm_head(model).logit_scale == 0.25
    logprob = response_logprob(
        model, pack([Group([3, 4], [[5, 6], [7]])]), Compute(packing="padded")
    )
    expected = model(torch.tensor([[3, 4, 5, 6]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logprob[:2], torch.stack([expected[1, 5], expected[2, 6]]))


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ValueError, match="scales or caps its logits"):
        check_head(model)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path: no model can be loaded from .*nothing") as e:
        load_policy(tmp_path / "nothing")
    assert "\n" not in str(e.value)


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.5
    model.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path).train()
    batch = pack([Group([1, 2], [[3, 4]])])
    first, _ = hidden_and_head(loaded, batch, Compute())
    assert torch.equal(first, hidden_and_head(loaded, batch, Compute())[0])
