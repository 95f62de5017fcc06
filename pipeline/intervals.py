"""Confidence intervals: a bootstrap over groups of rows, the same resamples for whatever is to be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.metrics import LESS_IS_BETTER, SHARES, Predictions, measure

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
WIDER = 1.2
"""Resampling predictions takes the heads that made them as given. Where these come from folds they vary as well, with
the examples they were fitted on, and the true deviation is 1.0 to 1.3 times the resampled one (200 simulated sets each
of 100 to 400 examples in 10 to 1,280 dimensions; why: Bates, Hastie and Tibshirani 2023)."""
CELLS = 4_000_000
"""Weights that are held at once; bounds memory."""
MOST_GROUPS = 20_000
"""Groups in the bag that is resampled where there are more, and more of rare classes."""
FEWEST = 50
"""Groups in the bag with any one class."""


@dataclass(frozen=True)
class Score:
    """A metric's value, how far it may be trusted, and how it varied.

    Attributes
    ----------
    value : float
        Over all rows; NaN where it is not defined.
    low, high : float
        Limits of the 95% interval.
    folds : list of float
        Over the rows of each fold alone.
    resampled : numpy.ndarray
        Over each resample, shape (`RESAMPLES`,).
    wider : float
        By which the interval exceeds that of the resamples.
    """

    value: float
    low: float
    high: float
    folds: list[float]
    resampled: Floats
    wider: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Without the resamples; what is not defined is None."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        told: dict[str, Any] = {name: _defined(value) for name, value in found.items()}
        return told | ({"folds": [_defined(fold) for fold in self.folds]} if self.folds else {})


def scores(predictions: Predictions, groups: Rows, fold: Rows | None = None) -> dict[str, Score]:
    """Every metric with its interval.

    Groups of rows are drawn with replacement, as many as there are, so that copies of an image, or the frames of one
    object, do not pass for independent evidence; limits are percentiles of the resampled deviations (Efron and
    Tibshirani 1993, chapter 13; Field and Welsh 2007 for the grouped one). Rows and groups alike give the same
    resamples, which makes the differences of two calls' `Score.resampled` those of a paired comparison.

    Of more than `MOST_GROUPS` groups about so many are drawn once, and resampled to the number of all: one bag of the
    bag of little bootstraps (Kleiner et al. 2014), which tells how far the value over all rows may be off, at the cost
    of the bag. Groups with a rare class are drawn more often, and count for less.

    Parameters
    ----------
    predictions : Predictions
    groups : numpy.ndarray
        int64, shape (rows,): equal for rows that belong together.
    fold : numpy.ndarray, optional
        int64, shape (rows,): the fold in which each row was held out.

    Returns
    -------
    dict of str to Score

    Examples
    --------
    >>> y = np.arange(40.0)
    >>> mae = scores(Predictions(y, y + 1), np.arange(40))["mae"]
    >>> mae.value, mae.low, mae.high
    (1.0, 1.0, 1.0)
    """
    numbers = np.unique(fold) if fold is not None else np.empty(0, np.int64)
    every = np.ones((1, len(predictions)))
    # One after the other: each is as long as there are rows.
    plain = [measure(predictions, weights) for weights in (every, *(every * (fold == number) for number in numbers))]
    values = {name: [float(each[name][0]) for each in plain] for name in plain[0]}
    different, place = np.unique(groups, return_inverse=True)
    independent, little, chances = len(different), predictions, None
    if independent > MOST_GROUPS:
        bag, chances = _bag(predictions, place, independent)
        rows = np.isin(place, bag)
        little, place = predictions.take(rows), np.searchsorted(bag, place[rows])
    drawn = [measure(little, weights) for weights in _resamples(place, independent, chances)]
    wider = _wider(independent, fold is not None)
    found = {}
    for name, (value, *folds) in values.items():
        resampled = np.concatenate([some[name] for some in drawn])
        low, high = limits(resampled, value, wider)
        if name in SHARES and low == high and value in (0, 1):
            # All right, or all wrong: no resample can tell otherwise, but three in so many could ("rule of three",
            # Hanley and Lippman-Hand 1983).
            low, high = (1 - 3 / independent, 1.0) if value else (0.0, 3 / independent)
        # R² alone may be below 0; what is not defined stays so.
        low = low if name == "r2" or not np.isfinite(low) else max(0.0, low)
        high = min(1.0, high) if name in SHARES | {"r2"} and np.isfinite(high) else high
        found[name] = Score(value, low, high, folds, resampled, wider)
    return found


def _bag(predictions: Predictions, place: Rows, count: int) -> tuple[Rows, Floats]:
    """Some of the groups, ascending, and the chance of each to be drawn, which adds up to that of those it stands for.

    A group is of its rarest class. Of each class there are as many as its share makes, but at least `FEWEST`, if so
    many there are: a resample of less would show too little of how recall varies.
    """
    rarest = np.zeros(count, np.int64)
    if predictions.classes is not None:
        classes = len(predictions.classes)
        holds = np.unique(place * classes + predictions.y) % classes
        order = np.argsort(np.argsort(np.bincount(holds, minlength=classes), kind="stable"), kind="stable")
        rarest[:] = classes
        np.minimum.at(rarest, place, order[predictions.y])
    shuffled = np.random.default_rng(SEED).permutation(count)
    shuffled = shuffled[np.argsort(rarest[shuffled], kind="stable")]
    sizes = np.bincount(rarest)
    taken = np.minimum(sizes, np.maximum(FEWEST, np.ceil(sizes * (MOST_GROUPS / count)).astype(np.int64)))
    number = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    bag = np.sort(shuffled[number < np.repeat(taken, sizes)])
    chances = (sizes / np.maximum(taken, 1))[rarest[bag]]
    return bag, chances / chances.sum()


def _resamples(place: Rows, size: int, chances: Floats | None = None) -> Iterator[Floats]:
    """Weights of the rows, some resamples at a time: how often each row's group, by place, came in `size` draws."""
    random, left = np.random.default_rng(SEED), RESAMPLES
    while left:
        count = min(left, max(1, CELLS // len(place)))
        # One draw after the other, so that the number at a time changes nothing.
        drawn = [
            np.bincount(random.integers(size, size=size), minlength=size)
            if chances is None
            else random.multinomial(size, chances)
            for _ in range(count)
        ]
        yield np.stack(drawn)[:, place].astype(np.float64)
        left -= count


def difference(ours: Score, theirs: Score, metric: str) -> dict[str, float | None]:
    """How much better one is than the other on the same rows: ``value``, ``low`` and ``high``; above 0 is better.

    Parameters
    ----------
    ours, theirs : Score
        From the same rows and groups.
    metric : str

    Returns
    -------
    dict
        In the metric's own unit; None where it is not defined.

    Examples
    --------
    >>> y = np.arange(40.0)
    >>> ours, theirs = (scores(Predictions(y, y + wrong), np.arange(40))["mae"] for wrong in (1, 3))
    >>> difference(ours, theirs, "mae")["value"]
    2.0
    """
    sign = -1 if metric in LESS_IS_BETTER else 1
    value = sign * (ours.value - theirs.value)
    low, high = limits(sign * (ours.resampled - theirs.resampled), value, ours.wider)
    found = {"value": value, "low": low, "high": high}
    return {name: _defined(value) for name, value in found.items()}


def limits(resampled: Floats, value: float, wider: float) -> tuple[float, float]:
    """Ends of the 95% interval around a value, as far from it as resampled ones are from their mean, and `wider`.

    The mean of resamples is not the value itself where resampling makes a metric worse, as it does the calibration
    error; NaN where no resample is defined.
    """
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    middle = float(defined.mean())
    return value + wider * (float(low) - middle), value + wider * (float(high) - middle)


def _wider(independent: int, in_folds: bool) -> float:
    """What an interval of resamples lacks: heads vary with their examples, and few groups with the draw of groups.

    The latter by Student's t and the correction of a variance for its sample, as for the mean of so many groups.
    """
    if independent < 2:
        return float("nan")
    few = stats.t.ppf((1 + LEVEL) / 2, independent - 1) / stats.norm.ppf((1 + LEVEL) / 2)
    return float(few * np.sqrt(independent / (independent - 1)) * (WIDER if in_folds else 1.0))


def _defined(value: float) -> float | None:
    """A score as JSON can hold it; R² of a single row, say, is not defined."""
    return float(value) if np.isfinite(value) else None
