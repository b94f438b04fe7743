"""Settings of DPO and related losses; each loss is a dataclass made from its function."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any, ClassVar, get_type_hints

from torch import Tensor

from fastalign import losses
from fastalign.losses.formulas import pair_losses
from fastalign.ops import PreferenceFormula
from fastalign.runs.config import PreferenceDataConfig, ReferencedConfig, above_zero

NLL_HELP = (
    "Weight of the chosen response's mean cross-entropy, added to the loss (RPO, arXiv 2404.19733)."
)


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its parameters.

    Attributes:
        beta: strength of the pull towards the reference, or the scale of a loss without one.
    """

    beta: float

    function: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        above_zero("loss.beta", self.beta)

    @property
    def name(self) -> str:
        """The loss's name on the command line and in `config.yaml`: its function's."""
        return type(self).function.__name__

    @property
    def uses_ties(self) -> bool:
        """True if the loss distinguishes ties."""
        return self.formula().uses_ties

    def formula(self) -> PreferenceFormula:
        """Return the loss with these fields as its parameters."""
        return losses.formula(type(self).function, **asdict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle cannot find a class that was made from a function by its name.
        return make_loss, (self.name, asdict(self))


def loss_dataclass(function: Callable[..., Tensor]) -> type[PreferenceLoss]:
    """Return the dataclass of a preference loss: its keyword parameters and their help.

    Each has `nll_coefficient`, which `losses.formula` adds to a loss that has none of its own.
    """
    hints = get_type_hints(function, include_extras=True)
    fields = [
        (name, float, field(default=one.default, metadata={"help": hints[name].__metadata__[0]}))
        for name, one in inspect.signature(function).parameters.items()
        if one.kind is one.KEYWORD_ONLY
    ]
    if "nll_coefficient" not in {name for name, *_ in fields}:
        extra = field(default=0.0, metadata={"help": NLL_HELP})
        fields.append(("nll_coefficient", float, extra))
    summary = (function.__doc__ or "").partition("\n")[0]
    return make_dataclass(
        f"{function.__name__}_loss",
        fields,
        bases=(PreferenceLoss,),
        namespace={"function": staticmethod(function), "__doc__": summary},
        frozen=True,
    )


LOSSES: dict[str, type[PreferenceLoss]] = {
    name: loss_dataclass(function) for name, function in pair_losses().items()
}


def make_loss(name: str, parameters: dict[str, float]) -> PreferenceLoss:
    """Return the loss of that name in LOSSES."""
    return LOSSES[name](**parameters)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferencedConfig):
    """Direct preference optimisation (DPO and related losses) on preference pairs."""

    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    loss: PreferenceLoss = field(default_factory=LOSSES["dpo"])
