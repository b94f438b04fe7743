"""Settings of a run: frozen dataclasses that become flags (`--optim.lr`) and YAML keys.

An attribute's docstring is the flag's help text.
"""

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, get_args

from fastalign.choices import AttentionChoice, PackingChoice, TrackerName
from fastalign.data_sources import checked_sources
from fastalign.in_memory import NOT_GIVEN, is_given
from fastalign.ranks.config import ParallelConfig

States = Literal["float32", "8bit"]
Part = Literal["optimizer", "random", "kept", "grad_norms", "rollouts", "metrics"]
Input = Literal[
    "data",
    "eval_data",
    "ptx_data",
    "model",
    "base",
    "reference",
    "teacher",
    "value",
    "reward",
    "tokenizer",
]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
RowKind = Literal["sft", "preference", "unpaired"]


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ValueError with the setting's name, expectation and value unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the setting is finite and in [low, high]."""
    if not low <= value <= high or not math.isfinite(value):
        to = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}: expected a finite number of at least {low:g}{to}, got {value}")


def at_least(least: int, section: str, config: Any, *names: str) -> None:
    """Raise ValueError if one of a section's settings is below `least`, unless it is None."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, f"{section}.{name}", f"at least {least}", value)


def above_zero(name: str, value: float | None) -> None:
    """Raise ValueError unless the setting is None, or finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def changed_setting(config: Any) -> str | None:
    """Return the name of a section's first setting that is not its default, or None."""
    return next(iter(settings_off_default(config)), None)


def settings_off_default(config: Any, default: Any = None) -> dict[str, Any]:
    """Return the settings that are not at their defaults, by dotted names (`optim.lr`).

    `default` is a section that another holds by default; its values may differ from its class's.
    A setting without a default, and the name of a loss or another choice, is always returned.
    """
    changed: dict[str, Any] = {}
    if isinstance(getattr(config, "name", None), str):
        changed["name"] = config.name
    for entry in fields(config):
        value, usual = getattr(config, entry.name), entry.default
        if isinstance(default, type(config)):
            usual = getattr(default, entry.name)
        elif entry.default_factory is not MISSING and not is_dataclass(entry.default_factory):
            usual = entry.default_factory()  # the class of a section has its defaults itself
        if is_dataclass(value):
            inner = settings_off_default(value, usual)
            changed |= {f"{entry.name}.{name}": each for name, each in inner.items()}
        elif value != usual:
            changed[entry.name] = value
    return changed


MOST_SECONDS = 1e9  # beyond it, timers of the platform overflow


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raise ValueError, which names the setting, for a number that no run can use.

    It is infinite or NaN, does not fit into 64 bits, or is a time that no timer can wait for.
    """
    for entry in fields(config):
        value, name = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), name, "a finite number", number)
            if isinstance(number, int):
                require(-(2**63) <= number < 2**63, name, "a number of 64 bits", number)
            if name.endswith("_seconds") and number is not None:
                require(number <= MOST_SECONDS, name, f"at most {MOST_SECONDS:g}", number)


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on a frozen base (LoRA, arXiv 2106.09685), in place of full training."""

    rank: int = 0
    """Rank of the adapter; 0 trains every weight without an adapter."""
    alpha: float = 32.0
    """Scale the adapter's product by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Endings of layer names; all-linear is every linear layer except the head (lm_head)."""
    base: Literal["float32", "bf16", "nf4"] = "float32"
    """Format of the frozen weights; bf16 requires bf16 compute and nf4 (QLoRA) bitsandbytes."""
    save_merged: bool = True
    """Also write model/, the base with the adapter merged, beside adapter/ in peft's layout."""

    def __post_init__(self) -> None:
        at_least(0, "model.lora", self, "rank")
        above_zero("model.lora.alpha", self.alpha)
        if not self.targets:
            raise ValueError("model.lora.targets: expected at least one name, got none")
        if not self.rank and (name := changed_setting(self)):
            raise ValueError(
                f"model.lora.{name}: {getattr(self, name)} is a setting of an adapter; expected "
                "model.lora.rank above 0 with it, got 0"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    path: str = NOT_GIVEN
    """Folder in transformers' layout, or a hub name."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    save_dtype: SaveDtype = "auto"
    """Format of the weights of every model that is written; auto is that of the checkpoint that the
    model was loaded from. An adapter's own weights are float32."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        named = bool(self.path) or not is_given(self.path)
        require(named, "model.path", "a model folder or a hub name", self.path)
        choices = get_args(SaveDtype)
        require(self.save_dtype in choices, "model.save_dtype", ", ".join(choices), self.save_dtype)


@dataclass(frozen=True)
class DataConfig:
    """The training data and the handling of rows that do not fit."""

    train: str | tuple[str, ...] = field(
        default=NOT_GIVEN, metadata={"metavar": "SOURCE[:WEIGHT] ..."}
    )
    """Training data: files, folders or hub names; with a weight behind it, `a.jsonl:2` or
    `a.jsonl:0.5`, an epoch has each of a source's rows so many times."""
    eval: str | None = None
    """Held-out data with the same columns as the training data."""
    max_length: int = 1024
    """Maximum number of tokens of a prompt with one response."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used (error), or skip and count it."""
    on_too_long: Literal["error", "skip", "truncate"] = "error"
    """Stop at a row longer than max_length, skip it, or truncate its responses; all are counted."""

    kind: ClassVar[RowKind] = "sft"

    def __post_init__(self) -> None:
        if is_given(self.train):
            object.__setattr__(self, "train", checked_sources(self.train))
        at_least(2, "data", self, "max_length")


@dataclass(frozen=True)
class PreferenceDataConfig(DataConfig):
    """The preference data and the handling of rows that do not fit."""

    ties: Literal["error", "drop"] = "error"
    """Under a loss without ties, stop at a row labelled tie (error), or drop and count it."""

    kind: ClassVar[RowKind] = "preference"


@dataclass(frozen=True)
class UnpairedDataConfig(PreferenceDataConfig):
    """The answers with their labels, or comparisons, and the handling of rows that do not fit."""

    ties: Literal["error", "drop"] = "error"
    """Stop at a comparison labelled tie (error), or drop and count it."""

    kind: ClassVar[RowKind] = "unpaired"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up: constant, or decaying to zero."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of weight matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moment estimates."""
    eps: float = 1e-8
    """Term added to AdamW's denominator for numerical stability."""
    states: States = "float32"
    """Format of AdamW's moments: 8 bytes per weight, or about 2 with 8bit (bitsandbytes)."""
    grad_clip: float = 1.0
    """Clip the global gradient norm to this value; 0 disables clipping."""
    skip_sigma: float = 0.0
    """Skip a step whose gradient norm is this many standard deviations above the mean of the last
    128 norms (once there are 32); 0 never skips."""

    def __post_init__(self) -> None:
        within("optim.lr", self.lr, 0)
        at_least(0, "optim", self, "warmup_steps", "grad_clip", "skip_sigma", "weight_decay")
        require(self.eps > 0, "optim.eps", "more than 0", self.eps)
        inside = all(0 <= beta < 1 for beta in self.betas)
        require(inside, "optim.betas", "two numbers in [0, 1)", self.betas)
        require(self.states in get_args(States), "optim.states", "float32 or 8bit", self.states)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batching, precision and checkpoints of the run."""

    max_steps: int | None = None
    """Number of optimiser steps; by default as many as train.epochs needs."""
    epochs: float = 1.0
    """Number of passes over the data if train.max_steps is not given."""
    batch_size: int = 64
    """Number of examples in one optimiser step: at most all of them, each once (prompts that are
    sampled: some several times, if there are fewer)."""
    tokens_per_batch: int = 16384
    """Maximum tokens of one forward pass; limits memory and does not change the gradient."""
    packing: PackingChoice = "auto"
    """Compute each prompt once (shared_prefix), repeat it for each response (packed), or pad to a
    rectangle; auto is shared_prefix where that is exact, else padded."""
    attention: AttentionChoice = "auto"
    """Attention implementation of packed rows; auto takes the first of flash_attn, varlen, flex and
    sdpa that can run, as `fastalign doctor` lists them."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 compute with float32 weights, or float32; auto is bf16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """Device such as cpu, cuda or cuda:1; auto takes a GPU if there is one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile the model's layers with torch.compile, which delays the first steps."""
    max_buffer_bytes: int | None = None
    """Maximum bytes of logits held at a time; by default the operation chooses."""
    eval_every: int = 0
    """Number of steps between evaluations on data.eval; 0 evaluates only at the end."""
    best_metric: str | None = None
    """Write the model of the step whose evaluation was the best by this metric, such as eval_loss
    or eval_rewards/accuracies, in place of the last step's; its checkpoint is kept."""
    best_direction: Literal["auto", "max", "min"] = "auto"
    """Whether more (max) or less (min) of train.best_metric is better; auto knows it of losses, KL,
    accuracies, margins and rewards."""
    patience: int | None = None
    """End the run after this many evaluations in a row without a better train.best_metric; by
    default it goes on to its last step."""
    save_every: int = 0
    """Number of steps between checkpoints; 0 saves by train.save_minutes, and at the end."""
    save_minutes: float = 15.0
    """Minutes between checkpoints, whatever train.save_every is; 0 disables this."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    async_checkpoints: bool = True
    """Write checkpoints during training from a copy of the weights in host memory."""
    profile: int = 0
    """Write a trace of this step to profile/ for Chrome or Perfetto; 0 writes none."""
    stall_seconds: float = 1800.0
    """Write all threads' stacks to stalls.txt if a step takes longer; 0 disables this."""
    stop_at_step: int | None = None
    """Save and exit after this step as if interrupted; --run.resume continues."""

    def __post_init__(self) -> None:
        at_least(1, "train", self, "max_steps", "stop_at_step", "max_buffer_bytes", "patience")
        at_least(1, "train", self, "batch_size", "tokens_per_batch", "keep_checkpoints")
        at_least(0, "train", self, "eval_every", "save_every", "profile", "stall_seconds")
        within("train.save_minutes", self.save_minutes, 0)
        require(0 < self.epochs < float("inf"), "train.epochs", "more than 0", self.epochs)
        directions = ("auto", "max", "min")
        known = self.best_direction in directions
        require(known, "train.best_direction", ", ".join(directions), self.best_direction)
        if self.best_metric is None:
            for name, none in (("patience", None), ("best_direction", "auto")):
                if getattr(self, name) != none:
                    raise ValueError(
                        f"train.{name}: a setting of train.best_metric; expected a metric of "
                        "evaluations there, such as eval_loss, got none"
                    )
        elif not self.eval_every:
            raise ValueError(
                "train.eval_every: expected more than 0 with train.best_metric, which chooses "
                "among several evaluations; got 0, one at the end alone"
            )


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, its seed, and how to continue it."""

    dir: str = NOT_GIVEN
    """Folder to write everything to."""
    seed: int = 0
    """Random seed, which also fixes the order of the training data."""
    resume: bool = False
    """Continue from the newest valid checkpoint in run.dir."""
    start_afresh: tuple[Part, ...] = ()
    """Parts of the checkpoint to ignore: optimizer (AdamW's moments), random (generator states),
    kept (the algorithm's own numbers), grad_norms (for optim.skip_sigma), rollouts (unfinished
    ones), or metrics (accept a metrics.jsonl or samples.jsonl that is shorter than it was)."""
    accept_changed: tuple[Input, ...] = ()
    """Inputs that may have changed since the checkpoint: data, eval_data, ptx_data, model, base,
    reference, teacher, value, reward or tokenizer; by default any change is an error that names
    it."""
    export: str | None = None
    """With run.resume, write the newest valid checkpoint's models to this folder in transformers'
    layout and exit without training."""
    overwrite: bool = False
    """Replace what stands where the run writes its models (model/, adapter/, value/, eval/), even
    if this run did not make it."""

    def __post_init__(self) -> None:
        require(bool(self.dir) or not is_given(self.dir), "run.dir", "a folder", self.dir)
        for name, kind, what in (
            ("start_afresh", Part, "parts"),
            ("accept_changed", Input, "inputs"),
        ):
            given, known = getattr(self, name), get_args(kind)
            expected = f"{what} among {', '.join(known)}"
            require(set(given) <= set(known), f"run.{name}", expected, given)
        for name in ("start_afresh", "accept_changed", "export"):
            if getattr(self, name) and not self.resume:
                raise ValueError(f"run.{name}: expected run.resume beside it")


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that the run's numbers go to beside metrics.jsonl."""

    to: tuple[TrackerName, ...] = ()
    """Trackers among tensorboard, wandb, mlflow and trackio; each is an extra of fastalign with its
    name."""
    project: str = "fastalign"
    """Project (experiment in MLflow) that the run belongs to."""
    name: str | None = None
    """Name of the run in its trackers; by default that of its folder."""

    def __post_init__(self) -> None:
        known = get_args(TrackerName)
        require(set(self.to) <= set(known), "track.to", f"some of {', '.join(known)}", self.to)
        require(bool(self.project), "track.project", "a name", self.project)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of every training run; each algorithm's own class says what its data are.

    Model, data and folder have no defaults. The command line requires them; in Python they may be
    arguments of `fastalign.train_dpo` and its like instead, and the folder is then a new one.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference model that the policy is kept close to."""

    path: str | None = None
    """Folder or hub name; by default the model that training starts from."""
    cache_dir: str | None = None
    """Folder that caches reference log-probs; by default fastalign/ in the user's cache folder."""
    offload: bool = False
    """Keep the weights of reference.path in host memory and move its layers one by one."""

    def __post_init__(self) -> None:
        if self.offload and self.path is None:
            raise ValueError(
                "reference.offload: needs --reference.path; without it the reference is the model "
                "that training starts from"
            )


@dataclass(frozen=True, kw_only=True)
class ReferencedConfig(TrainingConfig):
    """Settings of an algorithm that compares the policy with a reference on given answers."""

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


def class_weight_of(text: str) -> tuple[str, float]:
    """Return the token and the weight of `TOKEN:WEIGHT`, split at the last colon.

    Raises:
        ValueError: if there is no token, or no finite weight above 0.
    """
    token, _, weight = str(text).rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    expected = "TOKEN:WEIGHT with a weight above 0, such as </s>:2"
    require(bool(token) and 0 < value < math.inf, "loss.class_weights", expected, text)
    return token, value


@dataclass(frozen=True)
class JSDLoss:
    """The divergence from teacher.path over the demonstrated tokens (GKD, arXiv 2306.13649)."""

    weight: float = 1.0
    """Share of the divergence in the loss; the cross-entropy has the rest."""
    beta: float = 0.5
    """Weight of the teacher in the mixture that both are compared with; 0 is KL(teacher || model)
    and 1 KL(model || teacher)."""
    temperature: float = 1.0
    """Divide both models' logits by this in the divergence."""

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1, "loss.jsd.weight", "a number in (0, 1]", self.weight)
        require(0 <= self.beta <= 1, "loss.jsd.beta", "a number in [0, 1]", self.beta)
        above_zero("loss.jsd.temperature", self.temperature)


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen teacher that the model learns to predict like; needs the model's tokens."""

    path: str | None = None
    """Folder or hub name of the teacher; by default there is none."""
    offload: bool = False
    """Keep the teacher's weights in host memory and move its layers one by one."""


@dataclass(frozen=True)
class SFTLoss:
    """The cross-entropy of demonstrations."""

    label_smoothing: float = 0.0
    """Spread this share of each target over the vocabulary (arXiv 1512.00567)."""
    z_coefficient: float = 0.0
    """Weight of the squared log-sum-exp of the logits (z-loss, arXiv 2204.02311; there 1e-4)."""
    class_weights: tuple[str, ...] = ()
    """Weights of tokens, each TOKEN:WEIGHT such as </s>:2, by whose sum the loss is divided; every
    other token has weight 1."""
    jsd: JSDLoss = field(default_factory=JSDLoss)

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "loss.label_smoothing", "a number in [0, 1)", smoothing)
        within("loss.z_coefficient", self.z_coefficient, 0)
        listed = isinstance(self.class_weights, tuple | list)
        require(listed, "loss.class_weights", "a tuple of TOKEN:WEIGHT", self.class_weights)
        for text in self.class_weights:
            class_weight_of(text)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on demonstrations."""

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: SFTLoss = field(default_factory=SFTLoss)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))


def check_teacher(config: SFTConfig) -> None:
    """Raise ValueError, which names it, for a setting that has no effect with or without a teacher.

    A run in Python may be given the teacher beside its settings, so no section can tell by itself.
    """
    loss, teacher = config.loss, config.teacher
    if teacher.path is None:
        for section, settings in (("loss.jsd", loss.jsd), ("teacher", teacher)):
            if name := changed_setting(settings):
                raise ValueError(
                    f"{section}.{name}: {getattr(settings, name)} is a setting of a teacher; "
                    "expected teacher.path with it, got none"
                )
    elif loss.jsd.weight == 1:
        for name in ("label_smoothing", "z_coefficient", "class_weights"):
            if getattr(loss, name):
                raise ValueError(
                    f"loss.{name}: a term of the cross-entropy, which is no part of the loss; "
                    "expected loss.jsd.weight below 1 with it, got 1"
                )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the settings as nested dictionaries, as `config.yaml` holds them.

    A setting that is one of several dataclasses (a loss, an advantage) also has its `name`. Tuples
    become lists, since YAML has no tuples.
    """
    values: dict[str, Any] = {}
    if isinstance(getattr(config, "name", None), str):
        values["name"] = config.name
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            value = config_to_dict(value)
        if isinstance(value, tuple):
            values[entry.name] = [str(one) if isinstance(one, str) else one for one in value]
        else:  # of an object in place of a path its name
            values[entry.name] = str(value) if isinstance(value, str) else value
    return values
