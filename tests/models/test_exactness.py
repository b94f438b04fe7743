"""Packed, shared-prefix and padded equal one sequence at a time: log-probs and every gradient."""

import random
from typing import Any

import pytest
import torch

from fastalign.batch.packed import Group, pack
from fastalign.compute import PACKINGS, Compute
from fastalign.models.forward import hidden_and_head, response_logprob
from fastalign.ranks.parallel import decoder_layers
from fastalign.runs.inputs import checkpoint_activations
from tests.tiny import SETTINGS, tiny_model

ARCHITECTURES = sorted(SETTINGS)


def random_groups(seed: int = 0, *, masked: bool = False) -> list[Group]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        # 0 is the pad id: it must be a token like any other
        return [rng.randrange(97) for _ in range(rng.randint(low, high))]

    groups = []
    for number_of_responses, longest in [(2, 9), (1, 4), (3, 12), (2, 1), (2, 20)]:
        responses = [tokens(1, longest) for _ in range(number_of_responses)]
        masks = [[rng.random() < 0.6 for _ in response] for response in responses]
        groups.append(Group(tokens(1, 11), responses, masks if masked else None))
    return groups


def one_at_a_time(model: Any, groups: list[Group]) -> torch.Tensor:
    """The plainest code: transformers' own eager attention, one sequence, all logits."""
    model.set_attn_implementation("eager")
    values = []
    for group in groups:
        for number, response in enumerate(group.response_ids):
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logits = model(ids, use_cache=False).logits[0]
            logprob = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            start = len(group.prompt_ids) - 1
            values.append(logprob[start:][group.target_positions(number)])
    model.set_attn_implementation("fastalign_blocks")
    return torch.cat(values)


def gradients(model: Any, logprob: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, logprob.numel(), dtype=logprob.dtype)
    model.zero_grad(set_to_none=True)
    (weights * logprob).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked_tokens"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_every_gradient_equal_one_sequence_at_a_time(
    architecture: str, packing: Any, masked: bool
) -> None:
    model = tiny_model(architecture, dtype=torch.float64)
    groups = random_groups(masked=masked)
    expected = one_at_a_time(model, groups)
    expected_gradients = gradients(model, expected)
    batch = pack(groups, share_prompts=packing != "packed")
    actual = response_logprob(model, batch, Compute(packing=packing))
    # transformers computes rotary frequencies and norms in float32 whatever the weights
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    for name, gradient in gradients(model, actual).items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=float(scale) * 1e-4, msg=name
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = pack(random_groups())
    plain = gradients(model, response_logprob(model, batch, Compute()))
    checkpoint_activations(model)
    again = gradients(model, response_logprob(model, batch, Compute()))
    for name, gradient in again.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_computes_its_mlp_only_where_it_is_read(
    architecture: str, checkpointing: bool
) -> None:
    model = tiny_model(architecture)
    if checkpointing:
        checkpoint_activations(model)
    batch, computed = pack(random_groups()), []
    for layer in decoder_layers(model, "test"):
        layer.mlp.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    response_logprob(model, batch, Compute()).sum().backward()
    num_read = batch.num_tokens - sum(len(group.prompt_ids) - 1 for group in random_groups())
    passes = [batch.num_tokens, num_read]
    assert computed == (passes + passes[::-1] if checkpointing else passes)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_group_does_not_see_its_neighbours(architecture: str) -> None:
    model = tiny_model(architecture)
    groups = random_groups()
    alone = torch.cat([response_logprob(model, pack([group]), Compute()) for group in groups])
    together = response_logprob(model, pack(groups), Compute())
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_response_does_not_see_its_sibling() -> None:
    model = tiny_model("llama")
    first = response_logprob(model, pack([Group([1, 5], [[7, 8], [9, 10, 11]])]), Compute())
    other = response_logprob(model, pack([Group([1, 5], [[30, 31], [9, 10, 11]])]), Compute())
    torch.testing.assert_close(first[2:], other[2:])
    assert not torch.allclose(first[:2], other[:2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gives_the_models_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = pack([Group([3, 4, 5], [[6, 7, 8]])])
    hidden, head = hidden_and_head(model, batch, Compute())
    logits = model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits[0, 2:5]
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-4)


def test_an_unknown_packing_is_refused() -> None:
    with pytest.raises(ValueError, match="packing: expected one of shared_prefix"):
        Compute(packing="dense")
