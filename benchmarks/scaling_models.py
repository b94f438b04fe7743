"""The models of docs/scaling.md, without data: their weights, and a batch's activations."""

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from fastalign.batch.packed import Group, PackedBatch, pack
from fastalign.estimate.memory import peak_of_step
from fastalign.estimate.model import move_to_fake
from fastalign.estimate.scaling import ModelWeights, weights_of
from fastalign.models import add_adapter, attention
from fastalign.runs.config import TrainConfig
from fastalign.runs.load_models import checkpoint_activations
from fastalign.runs.open import make_compute

VOCABULARY = 128256
SIZES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
MODELS = {"8B": "8B (Llama-3.1-8B's shapes)", "70B": "70B (Llama-3.1-70B's shapes)"}
HEAD_WIDTH = 128
RANK = 16
# Of one batch: pairs of 512 tokens after prompts of 512, and 1 GiB of logits at a time.
NUM_PAIRS, PART = 5, 512
LOGITS = 2**30
FEW = 2  # layers, from which those of many are told


def make(size: str, kind: str, *, num_layers: int | None = None, gathered: bool = False) -> Any:
    """A model on the meta device: `policy`, `adapter`, `reference`, `reward` or `frozen reward`.

    Args:
        size: of `SIZES`.
        kind: what it is.
        num_layers: in place of its own.
        gathered: all weights in bf16, as layers compute with them.
    """
    attention.register()
    shape = SIZES[size] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=shape["hidden_size"] // HEAD_WIDTH,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        num_labels=1,
        **shape,
    )
    of_tokens = AutoModelForSequenceClassification if "reward" in kind else AutoModelForCausalLM
    low = gathered or kind == "adapter"
    with torch.device("meta"):
        model = of_tokens.from_config(
            config,
            dtype=torch.bfloat16 if low else torch.float32,
            attn_implementation=attention.registered_name("sdpa"),
        ).eval()
        if kind == "adapter":
            add_adapter(model, rank=RANK, alpha=2 * RANK, targets=("all-linear",))
    if kind in ("reference", "frozen reward"):
        model.requires_grad_(False)
    return model


@cache
def weights(size: str, kind: str) -> ModelWeights:
    """As a rank keeps them: float32, of an adapter's base bf16."""
    return weights_of(make(size, kind))


@cache
def batch() -> PackedBatch:
    """Of 7,680 tokens, 5,120 of them predicted."""
    groups = [Group([1] * PART, [[2] * PART, [3] * PART])] * NUM_PAIRS
    return pack(groups, share_prompts=True)


@cache
def activations_of(size: str, kind: str, *, checkpointed: bool, gathered: bool = True) -> int:
    """Bytes of a batch's activations and the head's buffers, as `fastalign estimate` finds them.

    Each layer beyond the first few adds what the last of them did; where they are checkpointed, at
    most its input, and autocast's bf16 copies of weights that are not gathered as such.
    """
    few = peak(size, kind, FEW, checkpointed, gathered)
    more = SIZES[size]["num_hidden_layers"] - FEW
    if not checkpointed:
        return few + more * (peak(size, kind, FEW + 1, checkpointed, gathered) - few)
    wide = [w.size for w in weights(size, kind).layers[0] if not gathered and w.element > 2]
    element = 4 if wide else 2
    given = batch().num_tokens * SIZES[size]["hidden_size"] * element
    return few + more * (given + 2 * sum(wide))


def peak(size: str, kind: str, num_layers: int, checkpointed: bool, gathered: bool) -> int:
    """Of a model with that many layers."""
    train = TrainConfig(device="cpu", precision="bf16", max_buffer_bytes=LOGITS)
    compute = make_compute(train)
    model = make(size, kind, num_layers=num_layers, gathered=gathered)
    move_to_fake(model, compute.device)
    if checkpointed:
        checkpoint_activations(model)
    found = peak_of_step(model, batch(), compute, states="float32", several=False)
    return found.activations
