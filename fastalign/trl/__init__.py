"""TRL's trainers with fastalign's head: `from fastalign.trl import FusedDPOTrainer as DPOTrainer`.

The classes are `FusedDPOTrainer`, `FusedGRPOTrainer`, `FusedKTOTrainer`, `FusedRLOOTrainer` and
`FusedSFTTrainer`. Each is the trainer of TRL of that name and takes the same arguments. It is made
when it is first asked for, because TRL imports much with each of its trainers.
"""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    FusedDPOTrainer: Any
    FusedGRPOTrainer: Any
    FusedKTOTrainer: Any
    FusedRLOOTrainer: Any
    FusedSFTTrainer: Any

__all__ = [
    "FusedDPOTrainer",
    "FusedGRPOTrainer",
    "FusedKTOTrainer",
    "FusedRLOOTrainer",
    "FusedSFTTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import trl
    except ModuleNotFoundError:
        raise ValueError("fastalign.trl needs TRL: pip install 'fastalign[trl]'") from None
    from fastalign.trl.fused_head import FusedHead

    base = getattr(trl, name.removeprefix("Fused"))
    fields = {
        "__doc__": f"`trl.{base.__name__}`, whose models get fastalign's head: see `FusedHead`.",
        "__module__": __name__,
        "__signature__": inspect.signature(base),
    }
    made = globals()[name] = type(name, (FusedHead, base), fields)
    return made
