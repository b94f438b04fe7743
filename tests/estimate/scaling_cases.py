"""What `test_scaling.py` and the ranks that it starts agree on."""

from dataclasses import dataclass
from typing import Any

from fastalign.batch.packed import Group

LENGTH = 9  # tokens of a group: one fits in a batch, two do not


@dataclass(frozen=True)
class Case:
    """A run of a tiny model: its `parallel` settings, and batches of each rank in a step."""

    settings: dict[str, Any]
    batches: int = 1
    precision: str = "float32"
    adapter: bool = False
    checkpointed: bool = False
    tokens: int = LENGTH + 1


FSDP = {"strategy": "fsdp"}
CASES = {
    "ddp": Case({"strategy": "ddp"}),
    "ddp, 3 batches": Case({"strategy": "ddp"}, 3),
    "ddp, adapter": Case({"strategy": "ddp"}, adapter=True),
    "fsdp": Case(FSDP),
    "fsdp, 3 batches": Case(FSDP, 3),
    "fsdp, bf16": Case(FSDP, 3, precision="bf16"),
    "fsdp, no_sync": Case({**FSDP, "no_sync": True}),
    "fsdp, no_sync, 3 batches": Case({**FSDP, "no_sync": True}, 3, precision="bf16"),
    "fsdp, gathered": Case({**FSDP, "reshard_after_forward": False}),
    "fsdp, gathered, no_sync, 3 batches": Case(
        {**FSDP, "reshard_after_forward": False, "no_sync": True}, 3
    ),
    "fsdp, gathered, 3 batches": Case({**FSDP, "reshard_after_forward": False}, 3),
    "fsdp, offload": Case({**FSDP, "offload": True}),
    "fsdp, adapter": Case(FSDP, adapter=True),
    "fsdp, checkpointed": Case(FSDP, 3, checkpointed=True),
}
# Of a model whose weights are nearly everything: at its fullest moments.
PEAKS = {
    "ddp": Case({"strategy": "ddp"}),
    "fsdp": Case(FSDP),
    "fsdp, no_sync": Case({**FSDP, "no_sync": True}, 2),
    "fsdp, gathered": Case({**FSDP, "reshard_after_forward": False}),
}
HEAVY = {  # about 2 million parameters, of which a layer has an eighth
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def groups(count: int) -> list[Group]:
    """As many prompts with a response, of equal length."""
    return [
        Group(prompt_ids=[3 + n % 7] * 4, response_ids=[[11 + n % 5] * (LENGTH - 4)])
        for n in range(count)
    ]
