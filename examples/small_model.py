"""A model of random weights with its tokenizer: the examples run in seconds, without a download.

In place of it: `from_pretrained` of transformers' `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from itertools import islice
from typing import Any

from fastalign import samples
from fastalign.cli.models import NewModelConfig, NewModelData, make_model, train_tokenizer
from fastalign.data.read import read_texts

TEXTS = samples.folder("pros_cons") / "texts_train.jsonl.gz"


def small_model() -> tuple[Any, Any]:
    """Return a Llama of 150,000 random weights, and a tokenizer trained on product opinions."""
    tokenizer = train_tokenizer(islice(read_texts(TEXTS), 500), 512)
    config = NewModelConfig(
        NewModelData(str(TEXTS)), out="", hidden_size=64, layers=2, max_positions=512
    )
    return make_model(config, len(tokenizer)), tokenizer
