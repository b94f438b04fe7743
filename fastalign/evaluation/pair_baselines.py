"""What a reward model must beat: the longer response wins; a bag of words."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the squared weights, in a sum over pairs: what scikit-learn's logistic regression has.
PENALTY = 0.5
MAX_ITERATIONS = 200


def longer_wins(lengths: Tensor) -> Tensor:
    """(N,) 1 where the first of two lengths (N, 2) is the larger, one half where they are equal."""
    difference = lengths[:, 0] - lengths[:, 1]
    return (difference > 0).double() + (difference == 0).double() / 2


def count_words(text: str) -> Counter[str]:
    """How often each word of a text occurs in it, whatever its case."""
    return Counter(re.findall(r"\w+", text.lower()))


class BagOfWordsBaseline:
    """A logistic regression on differences of word counts, trained on pairs.

    The probability that the first response wins is sigmoid(w . (counts_1 - counts_2)); w is the
    maximum of the likelihood less PENALTY |w|^2. A word that training did not have counts nothing.

    Args:
        pairs: texts of the preferred and the other response.

    Raises:
        ValueError: no pairs.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        if not pairs:
            raise ValueError("pairs: expected at least one, got none")
        differences = [_difference(*pair) for pair in pairs]
        words = sorted({word for difference in differences for word in difference})
        self._places = {word: place for place, word in enumerate(words)}
        self._weights = _fit(self._matrix(differences))

    def margin(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """(N,) float64: positive where the first response is the expected winner."""
        matrix = self._matrix([_difference(*pair) for pair in pairs])
        return torch.mv(matrix, self._weights)

    def _matrix(self, differences: Sequence[dict[str, int]]) -> Tensor:
        """Sparse (N, words)."""
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
    counts = count_words(first)
    counts.subtract(count_words(second))
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
