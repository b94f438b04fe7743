"""torch.compile of a model's layers, one by one, so that layers of one kind compile once."""

import os
import shutil
from typing import Any

from fastalign.ranks.parallel import decoder_layers


def compile_layers(model: Any, *, backend: str = "inductor") -> None:
    """Compiles each decoder layer in place; parameters keep their names.

    The number of tokens is a symbol, so batches of different sizes run one program. Shared-prefix
    attention is not part of it; embeddings, the final norm and the head are as they were.

    Args:
        model: a causal model from `load_policy`.
        backend: of torch.compile.

    Raises:
        ValueError: the model has no layers that transformers marks as such, or there is no
            compiler for a CPU.
    """
    layers = decoder_layers(model, "train.compile")
    compiler = os.environ.get("CXX", "g++")
    if backend == "inductor" and model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"train.compile: on a CPU it needs a C++ compiler; {compiler} is not there"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
