"""The training loss and its metrics on held-out data, while training."""

from fastalign.trainers.accumulate import BatchLoss, Examples, accumulate, add_sums
from fastalign.trainers.compute import Compute
from fastalign.trainers.metrics import Metrics, mean_metrics

# Examples that are cut into batches together; bounds the work of cutting, not the result.
PIECE = 1024


def evaluate_by_loss(examples: Examples, batch_loss: BatchLoss, compute: Compute) -> Metrics:
    """Metrics named `eval_...` of all the examples; `batch_loss` divides by their whole count."""
    loss = 0.0
    sums: dict[str, float] = {}
    for start in range(0, len(examples.groups), PIECE):
        indices = range(start, min(start + PIECE, len(examples.groups)))
        part, part_sums, _ = accumulate(examples, indices, batch_loss, compute, backward=False)
        loss += part
        add_sums(sums, part_sums)
    return {f"eval_{name}": value for name, value in ({"loss": loss} | mean_metrics(sums)).items()}
