"""The settings of a run: frozen dataclasses that become flags (`--optim.lr`) and YAML keys.

An attribute's docstring is the flag's help text.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

from fastalign.compute import AttentionChoice, Packing
from fastalign.ranks.config import ParallelConfig

Precision = Literal["auto", "bf16", "float32"]


Schedule = Literal["constant", "linear", "cosine"]


States = Literal["float32", "8bit"]


Part = Literal["optimizer", "random", "kept", "grad_norms", "rollouts", "metrics"]


BasePrecision = Literal["float32", "bf16", "nf4"]


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ValueError, naming the setting, what was expected and what came, unless it holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the setting is finite and in [low, high]."""
    if not low <= value <= high or not math.isfinite(value):
        to = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}: expected a finite number of at least {low:g}{to}, got {value}")


def above_zero(name: str, value: float | None) -> None:
    """Raise ValueError unless the setting is None, or finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on a frozen base (LoRA, arXiv 2106.09685), in place of full training."""

    rank: int = 0
    """Rank of the adapter; 0: none, every weight is trained."""
    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Endings of layers' names; all-linear: every linear layer but the head (lm_head adds it)."""
    base: BasePrecision = "float32"
    """The frozen weights; bf16 needs bf16 compute, nf4 (QLoRA, arXiv 2305.14314) bitsandbytes."""
    save_merged: bool = True
    """Beside adapter/ (peft's layout) also write model/, the base with the adapter merged."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.lora.rank: expected at least 0, got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(
                f"model.lora.alpha: expected a finite number above 0, got {self.alpha}"
            )
        if not self.targets:
            raise ValueError("model.lora.targets: expected at least one name, got none")
        if self.rank > 0:
            return
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                raise ValueError(
                    f"model.lora.{entry.name}: {value} is a setting of an adapter; expected "
                    "model.lora.rank above 0 with it, got 0"
                )


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    path: str = ""
    """Folder in transformers' layout, or a hub name."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", "a model folder or a hub name", self.path)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and what happens to rows that do not fit."""

    train: str = ""
    """File, folder or hub name."""
    eval: str | None = None
    """Held-out data in the same columns."""
    max_length: int = 1024
    """Most tokens of a prompt with one response."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop, or skip and count it."""
    on_too_long: Literal["error", "skip", "truncate"] = "error"
    """A row over max_length: stop, skip and count it, or cut its responses and count it."""

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", "a file, folder or hub name", self.train)
        require(self.max_length >= 2, "data.max_length", "at least 2", self.max_length)


@dataclass(frozen=True)
class PreferenceDataConfig(DataConfig):
    """Preference data."""

    ties: Literal["error", "drop"] = "error"
    """Rows that say tie, under a loss without ties: stop, or drop and count them."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """From the peak to zero (linear, cosine), or constant; after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (norms and biases have none)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    states: States = "float32"
    """AdamW's two averages: 8 bytes a weight, or about 2 (8bit, through bitsandbytes)."""
    grad_clip: float = 1.0
    """Most norm of the whole gradient; 0: not clipped."""
    skip_sigma: float = 0.0
    """Skip a step whose gradient's norm is so many standard deviations above the mean of the last
    128 (from 32 on); 0: never."""

    def __post_init__(self) -> None:
        require(0 <= self.lr < float("inf"), "optim.lr", "a finite number of at least 0", self.lr)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "at least 0", self.warmup_steps)
        require(self.grad_clip >= 0, "optim.grad_clip", "at least 0", self.grad_clip)
        require(self.skip_sigma >= 0, "optim.skip_sigma", "at least 0", self.skip_sigma)
        require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        require(self.eps > 0, "optim.eps", "more than 0", self.eps)
        inside = all(0 <= beta < 1 for beta in self.betas)
        require(inside, "optim.betas", "two numbers in [0, 1)", self.betas)
        require(self.states in get_args(States), "optim.states", "float32 or 8bit", self.states)


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what pieces, with what precision."""

    max_steps: int | None = None
    """Optimiser steps; default: as many as epochs need."""
    epochs: float = 1.0
    """Passes over the data, where max_steps is not given."""
    batch_size: int = 64
    """Examples of one optimiser step."""
    tokens_per_batch: int = 16384
    """Most packed tokens of one forward: memory only, the gradient does not depend on it."""
    packing: Packing = "shared_prefix"
    """Prompts computed once, repeated for each response (packed), or a padded rectangle."""
    attention: AttentionChoice = "auto"
    """How a packed row's attention is computed; auto: the first of flash_attn, varlen, flex, sdpa
    that can run (fastalign doctor lists them)."""
    precision: Precision = "auto"
    """bf16 compute with float32 weights, or float32; auto: bf16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    compile: bool = False
    """Compile the model's layers (torch.compile); the first steps wait for it."""
    max_buffer_bytes: int | None = None
    """Most bytes of logits at a time; default: chosen by the operation."""
    eval_every: int = 0
    """Steps between evaluations on data.eval; 0: at the end only."""
    save_every: int = 0
    """Steps between checkpoints; 0: at the end, and when the run is stopped."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy of the weights in host memory."""
    profile: int = 0
    """Write a trace of this step to profile/ (Chrome, Perfetto); 0: none."""
    stall_seconds: float = 1800.0
    """Write every thread's stack to stalls.txt when a step takes longer; 0: never."""
    stop_at_step: int | None = None
    """Save and leave after this step, as if stopped there; --run.resume goes on."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "stop_at_step", "max_buffer_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", "at least 1", value)
        for name in ("batch_size", "tokens_per_batch", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", "at least 1", value)
        for name in ("eval_every", "save_every", "profile", "stall_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", "at least 0", value)
        require(0 < self.epochs < float("inf"), "train.epochs", "more than 0", self.epochs)


@dataclass(frozen=True)
class RunConfig:
    """The run's folder and its seed."""

    dir: str = ""
    """Folder that everything is written to."""
    seed: int = 0
    """Of the data's order and of everything random."""
    resume: bool = False
    """Go on from the newest good checkpoint in run.dir."""
    start_afresh: tuple[Part, ...] = ()
    """Parts of the checkpoint that are not read: optimizer (AdamW's averages), random (generators),
    kept (the algorithm's own numbers), grad_norms (of optim.skip_sigma), rollouts (begun ones);
    metrics: metrics.jsonl goes on from what there is of it, if it is shorter than it was."""

    export: str | None = None
    """With resume: write the newest good checkpoint's models to this folder, in transformers'
    layout, and train no more."""

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir", "a folder", self.dir)
        known = set(self.start_afresh) <= set(get_args(Part))
        expected = f"parts among {', '.join(get_args(Part))}"
        require(known, "run.start_afresh", expected, self.start_afresh)
        for name in ("start_afresh", "export"):
            if getattr(self, name) and not self.resume:
                raise ValueError(f"run.{name}: expected run.resume beside it")


class AnyConfig(Protocol):
    """A frozen dataclass that the loop can run."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model(self) -> ModelConfig:
        """The model to train."""

    @property
    def data(self) -> Any:
        """What is trained on."""

    @property
    def run(self) -> RunConfig:
        """The run's folder and its seed."""

    @property
    def optim(self) -> OptimConfig:
        """The optimiser."""

    @property
    def train(self) -> TrainConfig:
        """How long, in what pieces, with what precision."""

    @property
    def parallel(self) -> ParallelConfig:
        """How several ranks share models and work."""


def config_to_dict(config: AnyConfig) -> dict[str, Any]:
    """The settings as nested dictionaries, as `config.yaml` holds them; a loss has its `name`."""
    values = asdict(config, dict_factory=_with_lists)
    if "loss" in values:
        values["loss"] = {"name": config.loss.name, **values["loss"]}  # type: ignore[attr-defined]
    return values


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary with lists for tuples, which YAML has not."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}
