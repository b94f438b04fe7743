"""What the settings of every algorithm have in common, and how they are saved."""

from dataclasses import asdict
from typing import Any, ClassVar, Protocol

from fastalign.trainers.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastalign.trainers.parallel_config import ParallelConfig
from fastalign.trainers.preference_losses import LOSSES
from fastalign.trainers.reward_losses import REWARD_LOSSES


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
        names = {cls: name for table in (LOSSES, REWARD_LOSSES) for name, cls in table.items()}
        values["loss"] = {"name": names[type(config.loss)], **values["loss"]}  # type: ignore[attr-defined]
    return values


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary with lists for tuples, which YAML has not."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}
