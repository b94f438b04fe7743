"""The report's table of reward models: each run, and under it the baselines on its pairs."""

from collections.abc import Sequence

from fastalign.report.runs import RunRecord

REWARD_COLUMNS = (
    "reward model",
    "accuracy",
    "the longer won",
    "the shorter won",
    "log-likelihood",
    "without ties",
    "calibration error",
)
_BASELINES = (("longer_wins", "the longer wins"), ("bag_of_words", "a bag of words"))


def cell(measure: tuple[float, float] | None) -> str:
    """`0.868 ± 0.011`, or nothing."""
    return "" if measure is None else f"{measure[0]:.3f} ± {measure[1]:.3f}"


def reward_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Rows under REWARD_COLUMNS of the runs that trained a reward model and were judged."""
    rows = []
    for run in runs:
        if run.measure("log_likelihood") is None:
            continue
        assert run.evaluation is not None
        names = ("accuracy", "accuracy_longer_won", "accuracy_shorter_won")
        likelihoods = ("log_likelihood", "log_likelihood_untied")
        cells = [cell(run.measure(name)) for name in (*names, *likelihoods)]
        rows.append((run.name, *cells, f"{float(run.evaluation['calibration_error']):.3f}"))
        for name, label in _BASELINES:
            accuracy = run.measure(f"{name}_accuracy")
            if accuracy is not None:
                blank = [""] * (len(REWARD_COLUMNS) - 2)
                rows.append((f"{run.name}: {label}", cell(accuracy), *blank))
    return rows
