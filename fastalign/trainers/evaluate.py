"""The training loss and its metrics on held-out data, while training."""

from typing import Any

from fastalign.trainers.metrics import Metrics, mean_metrics
from fastalign.trainers.step import Compute, Examples, MakeLoss, MeasureHidden, accumulate

# Examples that are cut into batches together; bounds the work of cutting, not the result.
PIECE = 1024


def evaluate_by_loss(
    model: Any,
    examples: Examples,
    make_loss: MakeLoss,
    compute: Compute,
    measure: MeasureHidden | None = None,
) -> Metrics:
    """Metrics named `eval_...` of all the examples; `make_loss` divides by their whole count."""
    loss = 0.0
    sums: dict[str, float] = {}
    for start in range(0, len(examples.groups), PIECE):
        indices = range(start, min(start + PIECE, len(examples.groups)))
        part, part_sums, _ = accumulate(
            model, examples, indices, make_loss, compute, backward=False, measure=measure
        )
        loss += part
        for name, value in part_sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return {f"eval_{name}": value for name, value in ({"loss": loss} | mean_metrics(sums)).items()}
