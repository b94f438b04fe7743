"""How many weights a saved model has, told by the heads of its files."""

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "score.weight")


def num_product_weights(folder: Path) -> int | None:
    """Parameters of a saved model that a token is multiplied by; None: no model there.

    An input embedding that is not the head too is a table, and multiplies nothing.

    Raises:
        ValueError: a damaged file.
    """
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file}: a file of the run is damaged: {error}") from None
    if any(name.endswith(HEADS) for name in sizes):
        sizes = {name: size for name, size in sizes.items() if not name.endswith(EMBEDDINGS)}
    return sum(sizes.values()) or None
