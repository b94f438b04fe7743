"""Pairs under a frozen model: differences of last hidden states, and of its own rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.compare.store import Pair
from fastalign.compute import Compute
from fastalign.data.conversation import json_as_content
from fastalign.data.examples import PreferenceExample
from fastalign.data.readers.row import DataFault
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.architecture import is_reward_model, num_positions
from fastalign.models.forward import hidden_at, response_values
from fastalign.models.load import choose_packing, load_reward_model, read_config
from fastalign.models.lora_files import adapter_base, is_reward_adapter

# Directions of the differences that a head is fitted in; a fit stays under a second.
MOST_DIRECTIONS = 256


@dataclass(frozen=True)
class PairFeatures:
    """N pairs under a frozen model.

    Attributes:
        ids: id of each pair.
        prompts: number of each pair's prompt; pairs of one prompt have the same.
        difference: (N, K) float64, hidden state of response a less that of response b at their last
            tokens, in the K directions in which the pairs differ most, scaled so that the mean of
            the squared norms is 1.
        reward: (N,) float64, the difference of the rewards under the model's own head; 0 without.
        nu: the model's parameter of ties if it was trained with Rao and Kupper's, or None.
        unread: ids of pairs without features: too long for the model, or with the same tokens.
    """

    ids: tuple[int, ...]
    prompts: tuple[int, ...]
    difference: Tensor
    reward: Tensor
    nu: float | None
    unread: tuple[int, ...]


def pair_features(
    path: str, pairs: Sequence[Pair], compute: Compute, *, trust_remote_code: bool = False
) -> PairFeatures:
    """Run a reward model, or a causal model without its head, over all pairs.

    Raises:
        ValueError: if there is no model, or no pair that fits it.
    """
    config = read_config(adapter_base(path) or path, trust_remote_code=trust_remote_code)
    has_head = is_reward_adapter(path) or is_reward_model(config, path)
    packing = choose_packing("auto", [path], trust_remote_code=trust_remote_code)
    compute = Compute(compute.device, packing=packing)
    dtype = torch.bfloat16 if compute.device.type == "cuda" else torch.float32
    model = load_reward_model(path, compute, dtype=dtype, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    encoder = Encoder(load_tokenizer(path, trust_remote_code=trust_remote_code))
    groups, kept = fitting_groups(encoder, pairs, num_positions(model.config) or 2**31)
    if not groups:
        raise ValueError(f"reward: no pair is as short as the positions of {path}")

    def hidden(batch: PackedBatch) -> Tensor:
        return hidden_at(model, batch, batch.response_bounds[:, 1] - 1, compute).float()

    states = torch.stack(response_values(hidden, groups, compute)).double()  # (N, 2, D)
    difference = states[:, 0] - states[:, 1]
    reward = torch.zeros(len(kept), dtype=torch.float64)
    if has_head:
        reward = difference @ model.score.weight[0].double().cpu()
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(repr(pair.prompt), len(numbers)) for pair in kept]
    ids = tuple(pair.id for pair in kept)
    has_rao_kupper_ties = getattr(model.config, "tie_model", None) == "rao_kupper"
    return PairFeatures(
        ids=ids,
        prompts=tuple(prompts),
        difference=principal_directions(difference, MOST_DIRECTIONS),
        reward=reward,
        nu=model.config.tie_nu if has_rao_kupper_ties else None,
        unread=tuple(pair.id for pair in pairs if pair.id not in set(ids)),
    )


def fitting_groups(
    encoder: Encoder, pairs: Sequence[Pair], limit: int
) -> tuple[list[Group], list[Pair]]:
    """Return the tokens of the pairs that have at most `limit` of them, and these pairs."""
    examples = []
    for pair in pairs:
        prompt, first, second = map(
            json_as_content, (pair.prompt, pair.response_a, pair.response_b)
        )
        source = f"pair {pair.id}"
        examples.append(PreferenceExample(prompt, first, second, True, None, None, source, ""))
    groups, kept = [], []
    for pair, found in zip(pairs, encoder.rows(examples), strict=True):
        if isinstance(found, DataFault):
            continue
        ((group, _),) = found
        if len(group.prompt_ids) + max(map(len, group.response_ids)) <= limit:
            groups.append(group)
            kept.append(pair)
    return groups, kept


def principal_directions(difference: Tensor, most: int) -> Tensor:
    """Return differences (N, D) in their `most` largest principal directions, (N, K), scaled.

    Each dimension is scaled to a mean square of 1 before, since some of a model's are a thousand
    times larger than others. The directions are those around 0, not around a mean: the sign of a
    difference depends on which response was written first.
    """
    scaled = difference / difference.square().mean(0).sqrt().clamp(min=1e-12)
    if scaled.shape[1] > most:
        # eigh of (D, D) takes seconds from D = 4,096 on; a few more columns make it accurate.
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(0)
        _, _, directions = torch.svd_lowrank(scaled, q=min(most + 16, *scaled.shape), niter=4)
        torch.random.set_rng_state(generator_state)
        scaled = scaled @ directions[:, :most]
    return scaled / scaled.square().sum(1).mean().sqrt().clamp(min=1e-12)
