"""The head that is fitted again while people label, beside the page."""

import asyncio
from collections import Counter
from concurrent.futures import Executor
from typing import Any

from fastalign.compare.export import outcome
from fastalign.compare.features import PairFeatures
from fastalign.compare.head import HeadFit, fit_all, labels_of, ranking
from fastalign.compare.labelling import Labelling
from fastalign.compare.results import fit_rows
from fastalign.compare.store import Store


class Learner:
    """Fits the head after every `every` new verdicts, on another thread, and ranks the pairs by it.

    Args:
        store: where the measures of each fit go.
        labelling: gets the ranking.
        features: the pairs under the frozen model.
        every: number of verdicts between two fits.
        executor: what runs a fit; one at a time.
    """

    def __init__(
        self,
        store: Store,
        labelling: Labelling,
        features: PairFeatures,
        every: int,
        executor: Executor,
    ):
        self._store, self._labelling, self._features = store, labelling, features
        self._every, self._executor = every, executor
        self._running: asyncio.Future[HeadFit] | None = None
        self._num_fitted = 0
        self._last: dict[str, Any] = next(reversed(store.fits()), {})

    def counts(self) -> dict[int, tuple[list[int], bool]]:
        """Return each pair's votes for a, b and a tie, and whether the model did not choose it."""
        votes: dict[int, Counter[str]] = {}
        random: dict[int, bool] = {}
        for vote in self._labelling.votes():
            votes.setdefault(vote.pair, Counter())[outcome(vote)] += 1
            random.setdefault(vote.pair, vote.chosen_by != "model")
        return {
            pair: ([found[name] for name in ("a", "b", "tie")], random[pair])
            for pair, found in votes.items()
        }

    def fit(self) -> None:
        """Fit now, and wait for it: at the start, and in tests."""
        counts = self.counts()
        self._take(fit_all(self._features, labels_of(self._features, counts)), counts)

    def _take(self, found: HeadFit, counts: dict[int, tuple[list[int], bool]]) -> None:
        labelled = sorted(counts)
        self._labelling.rank(ranking(self._features, found.informative, labelled))
        if found.measures["num_labels"] != self._last.get("num_labels"):
            self._store.add_fit(found.measures)
        self._last = found.measures
        self._num_fitted = self._labelling.num_verdicts

    def heard(self) -> None:
        """Begin a fit if there are enough new verdicts and none is running."""
        if (
            self._running is not None
            or self._labelling.num_verdicts - self._num_fitted < self._every
        ):
            return
        counts = self.counts()
        labels = labels_of(self._features, counts)
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._executor, fit_all, self._features, labels)

        def take(done: "asyncio.Future[HeadFit]") -> None:
            self._running = None
            if not done.cancelled():
                self._take(done.result(), counts)

        self._running.add_done_callback(take)

    def words(self) -> list[tuple[str, str]]:
        """Return the held-out accuracy and the labels still needed, for the page."""
        return fit_rows(self._last)
