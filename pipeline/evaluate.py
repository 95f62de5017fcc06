"""Predictions of examples that a head was not fitted on: held out in folds, or kept for the test."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier, DummyRegressor
from threadpoolctl import threadpool_limits

from features.errors import DataError
from pipeline import blocks, tuning
from pipeline.folds import Examples, Fold, Rows, part
from pipeline.intervals import Score, difference, scores
from pipeline.metrics import Predictions
from pipeline.tuning import Fitted, Recipe

Tick = Callable[[], None]

EXPECTED_WARNINGS = (
    "Scoring failed",
    "invalid value encountered in",
    "One or more of the test scores",
    ".*fits failed",
    "The least populated class in y",
)
"""Of searches, where few examples do not allow a setting, and of folds within a fold, which may lack a rare class."""

SHARES_OF_EXAMPLES = (0.125, 0.25, 0.5)
MOST_EXACT = 2**22
"""Probabilities up to which they are held with double precision."""
FEWEST = 20
"""Examples below which a share of them is not worth a point of the learning curve."""


@dataclass(frozen=True)
class HeldOut:
    """What was said of examples by heads that were fitted without them.

    Attributes
    ----------
    rows : numpy.ndarray
        int64, shape (scored,): places among the examples.
    fold : numpy.ndarray
        int64, shape (scored,).
    groups : numpy.ndarray
        int64, shape (scored,).
    predictions : Predictions
    uncalibrated : Predictions or None
        Of the same heads before calibration.
    by_share : dict of float to tuple
        Predictions of heads that saw only so large a share of the examples, and how many these were.
    chosen : list of Fitted
        One for each fold, without its estimator.
    fit_seconds, predict_seconds : float
        For one fit of a fold, and for one example.
    """

    rows: Rows
    fold: Rows
    groups: Rows
    predictions: Predictions
    uncalibrated: Predictions | None
    by_share: dict[float, tuple[Predictions, int]]
    chosen: list[Fitted]
    fit_seconds: float
    predict_seconds: float

    def scores(self) -> dict[str, Score]:
        """Every metric with its interval."""
        return scores(self.predictions, self.groups, self.fold)


def held_out(
    recipe: Recipe, examples: Examples, folds: list[Fold], *, curve: bool = False, tick: Tick = lambda: None
) -> HeldOut:
    """Fit a recipe in every fold and predict what was held out; whatever it chooses, it chooses inside the fold.

    Parameters
    ----------
    recipe : Recipe
    examples : Examples
    folds : list of tuple of numpy.ndarray
    curve : bool
        Whether to fit on shares of the examples too, with the settings found on all of them.
    tick : callable, optional
        Told when a fold is done.

    Raises
    ------
    DataError
        If scikit-learn cannot fit the head to so few examples.
    """
    whole, classes = tuning.with_distances(recipe, examples), labels_of(examples)

    def one(place: Fold) -> tuple[Any, ...]:
        fit, score = place
        inside, outside = whole.take(fit), examples.take(score)
        with threadpool_limits(limits=1, user_api="openmp"):
            begun = time.perf_counter()
            try:
                fitted = tuning.fit(recipe, inside)
                done = time.perf_counter()
                said = predictions(fitted.estimator, outside, classes)
            except ValueError as error:
                told = f"{error}".partition("\n")[0]
                raise DataError(f"head {recipe.head!r} cannot learn from {len(fit)} examples: {told}") from None
            seconds = done - begun, (time.perf_counter() - done) / len(score)
            plain = _uncalibrated(fitted, outside, classes) if recipe.calibrate else None
            less = _by_share(recipe, fitted, inside, outside, classes) if curve else {}
        tick()
        return said, plain, less, replace(fitted, estimator=None), seconds

    found = _side_by_side(one, folds)
    said, plain, less, chosen, seconds = zip(*found, strict=True)
    return HeldOut(
        rows=np.concatenate([score for _, score in folds]),
        fold=np.repeat(np.arange(len(folds)), [len(score) for _, score in folds]),
        groups=np.concatenate([examples.groups[score] for _, score in folds]),
        predictions=joined(list(said)),
        uncalibrated=joined(list(plain)) if recipe.calibrate else None,
        by_share={
            share: (joined([each[share][0] for each in less]), round(np.mean([each[share][1] for each in less])))
            for share in SHARES_OF_EXAMPLES
            if all(share in each for each in less)
        },
        chosen=list(chosen),
        fit_seconds=float(np.mean([fit for fit, _ in seconds])),
        predict_seconds=float(np.mean([predict for _, predict in seconds])),
    )


def held_out_by_dummy(examples: Examples, folds: list[Fold]) -> Predictions:
    """What the labels alone allow: the most frequent class, or the mean, of each fold's examples."""
    said, examples = [], blind(examples)
    for fit, score in folds:
        said.append(predictions(dummy(examples.take(fit)), examples.take(score), labels_of(examples)))
    return joined(said)


def blind(examples: Examples) -> Examples:
    """The examples without their embeddings, which a dummy does not look at."""
    return replace(examples, X=np.empty((len(examples), 0), np.float32))


def dummy(examples: Examples) -> Any:
    """What a head must beat, fitted."""
    estimator = DummyRegressor() if examples.task == "regression" else DummyClassifier(strategy="prior")
    return estimator.fit(blind(examples).X, examples.y)


def labels_of(examples: Examples, others: Examples | None = None) -> NDArray[Any] | None:
    """Distinct labels, sorted; None for quantities."""
    if examples.task == "regression":
        return None
    return np.unique(np.concatenate([examples.y, others.y]) if others else examples.y)


def predictions(estimator: Any, examples: Examples, classes: NDArray[Any] | None) -> Predictions:
    """What a fitted head says of examples, beside their labels."""
    if classes is None:
        told = np.empty(len(examples))
        for rows, X in blocks.of(examples.X):
            told[rows] = estimator.predict(X)
        return Predictions(np.asarray(examples.y, float), told)
    place, known = np.searchsorted(classes, estimator.classes_), hasattr(estimator, "predict_proba")
    two = len(classes) == 2 and len(place) == 2
    cells = len(examples) * len(classes)
    shares = np.zeros((len(examples), len(classes)), np.float64 if cells <= MOST_EXACT else np.float32)
    predicted, margins = np.empty(len(examples), np.int64), np.empty(len(examples))
    for rows, X in blocks.of(examples.X):
        predicted[rows] = np.searchsorted(classes, estimator.predict(X))
        if known:
            some = np.zeros((len(X), len(classes)))
            some[:, place] = estimator.predict_proba(X)
            shares[rows] = some
        elif two:
            margins[rows] = estimator.decision_function(X)
    # What is compared must be of one kind: a calibrated head's margin is its probability.
    margins = shares[:, 1] if known and two else margins
    y = np.searchsorted(classes, examples.y)
    return Predictions(y, predicted, shares if known else None, margins if two else None, classes)


def joined(parts: list[Predictions]) -> Predictions:
    """Predictions of several folds as one."""

    def together(name: str) -> Any:
        values = [getattr(each, name) for each in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    columns = {name: together(name) for name in ("y", "predicted", "shares", "margins")}
    return Predictions(**columns, classes=parts[0].classes)


def learning_curve(found: HeldOut, metric: str, folds: list[Fold]) -> tuple[list[dict[str, Any]], Any]:
    """A metric by the number of examples, and what the last doubling of it gained.

    Returns
    -------
    points : list of dict
        ``rows``, ``value``, ``low``, ``high``; the last is of all examples of a fold.
    doubling : dict or None
        ``value``, ``low``, ``high`` of the gain from half of the examples to all; above 0 is better.
    """
    # Heads that saw a share are not calibrated.
    whole = found.uncalibrated or found.predictions
    everything, doubling = scores(whole, found.groups, found.fold), None
    points: list[dict[str, Any]] = []
    for share, (said, rows) in found.by_share.items():
        of_share = scores(said, found.groups, found.fold)[metric]
        points.append({"rows": rows, **_interval(of_share)})
        if share == 0.5:
            doubling = difference(everything[metric], of_share, metric)
    rows = round(np.mean([len(fit) for fit, _ in folds]))
    return [*points, {"rows": rows, **_interval(everything[metric])}], doubling


def _interval(score: Score) -> dict[str, Any]:
    return {name: value for name, value in score.to_json().items() if name != "folds"}


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep BLAS to one thread while this lasts, for folds run side by side; and keep still about settings that fail.

    BLAS threads wait for each other by spinning: on two cores with one other busy process, a logistic regression on
    1,437 x 1,280 took 7.3 s with two of them and 0.23 s with one. Filters of warnings are of the process, so the
    threads of the folds cannot set them.
    """
    with threadpool_limits(limits=1, user_api="blas"), warnings.catch_warnings():
        for about in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", about)
        yield


def _side_by_side(one: Callable[[Fold], tuple[Any, ...]], folds: list[Fold]) -> list[tuple[Any, ...]]:
    with one_thread_each():
        return list(Parallel(n_jobs=-1, backend="threading")(delayed(one)(place) for place in folds))


def _uncalibrated(fitted: Fitted, outside: Examples, classes: NDArray[Any] | None) -> Predictions | None:
    (calibrated,) = fitted.estimator.calibrated_classifiers_
    # It was fitted to places in the list of the fold's classes; see `pipeline.tuning`.
    assert classes is not None
    places = np.searchsorted(classes, fitted.estimator.classes_)
    mine = np.searchsorted(classes, outside.y)
    every = np.arange(len(classes))
    return replace(
        predictions(_Renamed(calibrated.estimator, places), replace(outside, y=mine), every), classes=classes
    )


class _Renamed:
    """A fitted head whose classes go by other names."""

    def __init__(self, head: Any, names: Rows):
        self.head, self.classes_ = head, names
        for method in ("predict_proba", "decision_function"):
            if hasattr(head, method):
                setattr(self, method, getattr(head, method))

    def predict(self, X: NDArray[np.float32]) -> Rows:
        return np.asarray(self.classes_[self.head.predict(X)])


def _by_share(
    recipe: Recipe, fitted: Fitted, inside: Examples, outside: Examples, classes: NDArray[Any] | None
) -> dict[float, tuple[Predictions, int]]:
    found = {}
    for share in SHARES_OF_EXAMPLES:
        rows = part(inside, share)
        every = classes is None or len(np.unique(inside.y[rows])) == len(np.unique(inside.y))
        if FEWEST <= len(rows) < len(inside) and every:
            X, y = inside.X[rows], inside.y[rows]
            head = tuning.built(recipe, fitted.head, fitted.settings, X).fit(X, y)
            found[share] = predictions(head, outside, classes), len(rows)
    return found
