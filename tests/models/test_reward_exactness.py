"""The score of a packed response equals that of one sequence alone, and so does every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastalign.batch.packed import Group, pack
from fastalign.compute import PACKINGS, Compute
from fastalign.data.tokenizer import use_distinct_pad
from fastalign.models import attention
from fastalign.models.load import load_reward_model, save_reward_model
from fastalign.models.reward import response_reward, set_pad_token
from tests.models.test_exactness import ARCHITECTURES, gradients, random_groups
from tests.tiny import tiny_model, tiny_reward_model
from tests.tokenizers import make_tokenizer


def sequences(groups: list[Group]) -> list[list[int]]:
    return [[*g.prompt_ids, *response] for g in groups for response in g.response_ids]


def one_at_a_time(model: Any, groups: list[Group]) -> Tensor:
    """transformers' own eager attention, one sequence, the score of its last token."""
    model.set_attn_implementation("eager")
    hidden = [
        model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        for ids in sequences(groups)
    ]
    model.set_attn_implementation(attention.registered_name("sdpa"))
    return model.score(torch.stack(hidden))[:, 0]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_every_gradient_equal_one_sequence_at_a_time(
    architecture: str, packing: Any
) -> None:
    model = tiny_reward_model(architecture, dtype=torch.float64)
    # A mask says what a policy learns; the last token is the last token whether masked or not.
    groups = random_groups(masked=True)
    expected = one_at_a_time(model, groups)
    # Squared: the plain scores' coefficients sum to zero, and so would a last bias's gradient.
    expected_gradients = gradients(model, expected.square())
    batch = pack(groups, share_prompts=packing != "packed")
    actual = response_reward(model, batch, Compute(packing=packing))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    for name, gradient in gradients(model, actual.square()).items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=float(scale) * 1e-4, msg=name
        )


def test_the_score_is_float32_under_autocast() -> None:
    model = tiny_reward_model("llama")
    batch = pack(random_groups())
    exact = response_reward(model, batch, Compute())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = response_reward(model, batch, Compute())
    assert low.dtype == torch.float32
    assert not torch.equal(low, low.bfloat16().float())
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("ends", ["eos", "pad is eos", "pad ends a response"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_transformers_serves_the_score_that_was_trained(
    architecture: str, ends: str, tmp_path: Path
) -> None:
    """Padded left, right or not at all: the saved folder's own forward reads the same token."""
    tokenizer = make_tokenizer(pad_is_eos=ends == "pad is eos")
    last = 0 if ends == "pad ends a response" else 2
    groups = [
        Group([1, *prompt], [[*response, last] for response in responses])
        for prompt, responses in [
            ([9, 0, 8], [[30, 31, 2, 40], []]),
            ([70], [[50] * 9, [2, 2], [0]]),
        ]
    ]
    tiny_model(architecture, vocab_size=320).save_pretrained(tmp_path / "policy")
    model = load_reward_model(tmp_path / "policy", seed=3)
    set_pad_token(model, use_distinct_pad(tokenizer, {2, last}))
    trained = response_reward(model, pack(groups), Compute()).detach()
    save_reward_model(model, tokenizer, tmp_path / "reward")

    again = load_reward_model(tmp_path / "reward")
    torch.testing.assert_close(response_reward(again, pack(groups), Compute()).detach(), trained)
    served = AutoModelForSequenceClassification.from_pretrained(
        # transformers' SDPA leaves out the softcap of gemma2's attention: eager is its definition
        tmp_path / "reward",
        attn_implementation="eager",
    )
    assert (served.config.num_labels, served.score.bias) == (1, None)
    padder = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert padder.pad_token_id == served.config.pad_token_id != last
    rows = sequences(groups)
    with torch.no_grad():
        single = torch.cat([served(torch.tensor([ids])).logits[:, 0] for ids in rows])
        torch.testing.assert_close(single, trained, rtol=1e-4, atol=1e-4)
        for side in ("left", "right"):
            batch = padder.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
            if architecture == "gpt2":  # its positions are absolute: transformers counts padding
                mask = batch["attention_mask"]
                batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            batched = served(**batch).logits[:, 0]
            torch.testing.assert_close(batched, trained, rtol=1e-4, atol=1e-4)
