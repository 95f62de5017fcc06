"""Scores: cross-validated on the training rows, and on the rows of the test, each beside a dummy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from joblib import parallel_config
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.base import clone
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, cross_validate
from threadpoolctl import threadpool_limits

from features.errors import DataError
from pipeline.dataset import Dataset, Task

SEED = 0

# For each task the metrics by the names reports use, and whether scikit-learn's scorer gives the negative of it.
SCORERS: dict[Task, dict[str, tuple[str, int]]] = {
    "classification": {
        "accuracy": ("accuracy", 1),
        "balanced_accuracy": ("balanced_accuracy", 1),
        "f1_macro": ("f1_macro", 1),
    },
    "regression": {
        "r2": ("r2", 1),
        "mae": ("neg_mean_absolute_error", -1),
        "rmse": ("neg_root_mean_squared_error", -1),
    },
}

Rows = NDArray[np.int64]
Scores = dict[str, dict[str, Any]]


def dummy(task: Task) -> Any:
    """What a head must beat: the most frequent class, or the mean."""
    return DummyClassifier(strategy="prior") if task == "classification" else DummyRegressor()


def fold(data: Dataset, task: Task, folds: int) -> list[tuple[Rows, Rows]]:
    """Shuffled folds, stratified by class; copies of one image stay together.

    Returns
    -------
    list of tuple of numpy.ndarray
        For each fold the rows to fit on and the rows to score.

    Raises
    ------
    DataError
        If a class, or the data, has fewer members than there are folds.
    """
    if folds < 2:
        raise DataError(f"{folds} folds cannot be cross-validated; use --folds 2 or more")
    images = len(np.unique(data.groups))
    if images < folds:
        raise DataError(f"{images} training images are too few for {folds} folds; use fewer --folds")
    if task == "classification":
        _require_members(data, folds)
    options = {"n_splits": folds, "shuffle": True, "random_state": SEED}
    if images < len(data):
        grouped = StratifiedGroupKFold if task == "classification" else GroupKFold
        return list(grouped(**options).split(data.X, data.y, data.groups))
    plain = StratifiedKFold if task == "classification" else KFold
    return list(plain(**options).split(data.X, data.y))


def _require_members(data: Dataset, folds: int) -> None:
    # Copies of one image share a fold, so they count as one member.
    members = pd.DataFrame({"class": data.y, "group": data.groups}).groupby("class")["group"].nunique()
    classes, counts = members.index, members.to_numpy()
    if len(classes) < 2:
        raise DataError(f"all {len(data)} training samples are of class {str(classes[0])!r}; a head needs two classes")
    rare = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < folds]
    if rare:
        raise DataError(
            f"{len(rare)} of {len(classes)} classes have fewer members than the {folds} folds: {', '.join(rare[:5])}; "
            "use fewer --folds, or leave those classes out with --where"
        )


def cross_validated(head: Any, data: Dataset, task: Task, folds: int) -> Scores:
    """Score a head and the dummy on held-out folds.

    Returns
    -------
    dict
        For ``head`` and ``dummy``, for each metric: ``folds`` (one score each), ``mean`` and ``std``.
    """
    # One list of folds, so that head and dummy are scored on the same rows.
    parts = fold(data, task, folds)
    scoring = {name: scorer for name, (scorer, _) in SCORERS[task].items()}
    scores: Scores = {}
    for who, estimator in (("head", head), ("dummy", dummy(task))):
        with one_thread_each(), parallel_config("threading", n_jobs=-1):
            found = cross_validate(clone(estimator), data.X, data.y, cv=parts, scoring=scoring, error_score="raise")
        scores[who] = {name: _spread(sign * found[f"test_{name}"]) for name, (_, sign) in SCORERS[task].items()}
    return scores


def one_thread_each() -> threadpool_limits:
    """Keep BLAS to one thread while this context lasts; folds run side by side instead.

    BLAS threads wait for each other by spinning: on two cores with one other busy process, a logistic regression on
    1,437 x 1,280 took 7.3 s with two of them and 0.23 s with one.
    """
    return threadpool_limits(limits=1, user_api="blas")


def tested(head: Any, train: Dataset, test: Dataset, task: Task) -> Scores:
    """Score a fitted head, and a dummy fitted on the same rows, on rows that neither has seen.

    Returns
    -------
    dict
        For ``head`` and ``dummy``, each metric's value.
    """
    baseline = dummy(task).fit(train.X, train.y)
    return {
        who: {
            name: _defined(sign * metrics.get_scorer(scorer)(estimator, test.X, test.y))
            for name, (scorer, sign) in SCORERS[task].items()
        }
        for who, estimator in (("head", head), ("dummy", baseline))
    }


def _spread(scores: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "mean": _defined(scores.mean()),
        "std": _defined(scores.std(ddof=1)),
        "folds": [_defined(score) for score in scores],
    }


def _defined(score: float) -> float | None:
    """A score as JSON can hold it; R² of a single row, say, is not defined."""
    return float(score) if np.isfinite(score) else None
