"""A baseline of a reward model: a bag of words."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Factor of the squared weights in a sum over pairs, as in scikit-learn's logistic regression.
PENALTY = 0.5
MAX_ITERATIONS = 200


class BagOfWordsBaseline:
    """A logistic regression on differences of word counts, trained on pairs.

    The probability that the first response wins is sigmoid(w . (counts_1 - counts_2)); w is the
    maximum of the log-likelihood minus PENALTY |w|^2. Words not seen in training are ignored.

    Args:
        pairs: texts of the preferred and the other response.

    Raises:
        ValueError: if there are no pairs.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        if not pairs:
            raise ValueError("pairs: expected at least one, got none")
        differences = [_difference(*pair) for pair in pairs]
        words = sorted({word for difference in differences for word in difference})
        self._places = {word: place for place, word in enumerate(words)}
        self._weights = _fit(self._matrix(differences))

    def margin(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return (N,) float64, positive where the first response is the expected winner."""
        matrix = self._matrix([_difference(*pair) for pair in pairs])
        return torch.mv(matrix, self._weights)

    def _matrix(self, differences: Sequence[dict[str, int]]) -> Tensor:
        """Return the sparse matrix (N, words) of the differences."""
        rows, columns, values = [], [], []
        for row, difference in enumerate(differences):
            for word, value in difference.items():
                if word in self._places:
                    rows.append(row)
                    columns.append(self._places[word])
                    values.append(float(value))
        return torch.sparse_coo_tensor(
            torch.tensor([rows, columns], dtype=torch.long),
            torch.tensor(values, dtype=torch.float64),
            (len(differences), len(self._places)),
            check_invariants=True,
        ).coalesce()


def _difference(first: str, second: str) -> dict[str, int]:
    """Return how often the first text has each word more than the second, ignoring case."""
    counts = Counter(re.findall(r"\w+", first.lower()))
    counts.subtract(re.findall(r"\w+", second.lower()))
    return {word: count for word, count in counts.items() if count}


def _fit(matrix: Tensor) -> Tensor:
    weights = torch.zeros(matrix.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-torch.mv(matrix, weights)).sum() + PENALTY * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
