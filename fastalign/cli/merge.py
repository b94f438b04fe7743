"""`fastalign merge`: an adapter and its base as one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastalign.cli.config_parse import parse_flags


@dataclass(frozen=True)
class MergeModel:
    """The adapter."""

    path: str
    """Folder in peft's layout; it names its base."""
    trust_remote_code: bool = False
    """Run code that comes with the base."""


@dataclass(frozen=True)
class MergeConfig:
    """Adds an adapter to the float32 weights of its base; writes OUT in transformers' layout."""

    model: MergeModel
    out: str
    """Folder to write."""


def main(argv: Sequence[str]) -> int:
    """Exit code 0: the folder is written."""
    from fastalign.compute import Compute
    from fastalign.data import load_tokenizer
    from fastalign.models import adapter_base, load_policy, save_model

    config = parse_flags(MergeConfig, argv, "fastalign merge")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder")
    if adapter_base(config.model.path) is None:
        raise ValueError(f"model.path: {config.model.path} is no adapter's folder (peft's layout)")
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=trust)
    model = load_policy(config.model.path, Compute(packing="padded"), trust_remote_code=trust)
    save_model(model, tokenizer, out)
    print(f"merged model written to {out}")
    return 0
