"""The argument of a loss function passed to `fused_linear_loss`, and checks of its result."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenChunk:
    """The rows row_start..row_stop of one call: the whole groups group_start..group_stop.

    n = row_stop - row_start. Log-probs and entropies are float32 (float64 for float64 products) and
    require grad wherever gradients are wanted.
    """

    logprob: Tensor  # (n,), 0 where not a target
    entropy: Tensor  # (n,), in nats; a loss that uses it has the logits computed again
    is_argmax: Tensor  # (n,) bool: no logit is larger than the target's
    is_target: Tensor  # (n,) bool: False where the target was ignore_index
    row_start: int
    row_stop: int
    group_start: int
    group_stop: int


LossFunction = Callable[[TokenChunk], tuple[Tensor, dict[str, Tensor]]]


def loss_of_all(
    loss_fn: LossFunction,
    logprob: Tensor,
    entropy: Tensor,
    is_argmax: Tensor,
    is_target: Tensor,
    num_groups: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and metrics of one chunk that holds every row."""
    num_rows = logprob.shape[0]
    chunk = TokenChunk(logprob, entropy, is_argmax, is_target, 0, num_rows, 0, num_groups)
    loss, metrics = loss_fn(chunk)
    check_scalar(loss)
    return loss, {name: value.detach() for name, value in metrics.items()}


def check_scalar(loss: Tensor) -> None:
    """Check the result of a loss function.

    Raises:
        ValueError: if it is not a scalar.
    """
    if loss.ndim != 0:
        raise ValueError(f"loss_fn: expected a scalar loss, got shape {tuple(loss.shape)}")
