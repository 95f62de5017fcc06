"""Metrics of predictions under many weightings of the rows at once, which is what a bootstrap asks for.

Each is scikit-learn's metric of that name with ``sample_weight``; a test compares them. One call of scikit-learn's
takes about a millisecond for each metric and weighting, and a leaderboard needs hundreds of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pipeline.targets import Task

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BINS = 15
"""Of confidence, for the calibration error; as many as Guo et al. 2017 take."""
LEAST_PROBABILITY = float(np.finfo(np.float64).eps)

MAIN: dict[Task, str] = {"binary": "accuracy", "multiclass": "accuracy", "regression": "r2"}
"""What heads are chosen and compared by; these are scikit-learn's names too."""
LESS_IS_BETTER = frozenset({"mae", "rmse", "log_loss", "brier", "ece"})
SHARES = frozenset({"accuracy", "balanced_accuracy", "f1_macro", "roc_auc", "average_precision"})
"""Those that lie between 0 and 1."""


@dataclass(frozen=True)
class Predictions:
    """What a head said of some rows, beside the truth.

    Attributes
    ----------
    y : numpy.ndarray
        Truth, shape (rows,): places in `classes`, or quantities.
    predicted : numpy.ndarray
        As `y`.
    shares : numpy.ndarray or None
        Probabilities, shape (rows, classes), from heads that know them.
    margins : numpy.ndarray or None
        For two classes: the larger, the more the second; shape (rows,).
    classes : numpy.ndarray or None
        Labels; None for quantities.

    Examples
    --------
    >>> said = Predictions(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0]))
    >>> {name: round(float(value[0]), 3) for name, value in measure(said, np.ones((1, 3))).items()}
    {'r2': 0.786, 'mae': 0.333, 'rmse': 0.577}
    """

    y: NDArray[Any]
    predicted: NDArray[Any]
    shares: Floats | None = None
    margins: Floats | None = None
    classes: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[Any]) -> Predictions:
        """Some of the rows."""
        parts = {"y": self.y[rows], "predicted": self.predicted[rows]}
        parts |= {
            name: None if (values := getattr(self, name)) is None else values[rows] for name in ("shares", "margins")
        }
        return replace(self, **parts)


def measure(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    """Every metric that the predictions allow.

    Parameters
    ----------
    predictions : Predictions
    weights : numpy.ndarray
        Shape (weightings, rows).

    Returns
    -------
    dict of str to numpy.ndarray
        float64 of shape (weightings,); NaN where a metric is not defined.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if predictions.classes is None:
            return _of_quantities(predictions.y, predictions.predicted, weights)
        found = _of_labels(predictions.y, predictions.predicted, len(predictions.classes), weights)
        if predictions.margins is not None:
            found |= _of_margins(predictions.y == 1, predictions.margins, weights)
        if predictions.shares is not None:
            found |= _of_shares(predictions.y, predictions.shares, weights)
    return found


def _of_quantities(y: Floats, predicted: Floats, weights: Floats) -> dict[str, Floats]:
    total = weights.sum(axis=1)
    # Around the mean of all: the plain sum of squares loses digits where the mean is large.
    y, predicted = y - y.mean(), predicted - y.mean()
    error = y - predicted
    squared = weights @ (error * error)
    spread = weights @ (y * y) - (weights @ y) ** 2 / total
    enough = (weights > 0).sum(axis=1) > 1
    return {
        "r2": np.where(enough & (spread > 0), 1 - squared / spread, np.nan),
        "mae": weights @ np.abs(error) / total,
        "rmse": np.sqrt(squared / total),
    }


def _of_labels(y: Rows, predicted: Rows, classes: int, weights: Floats) -> dict[str, Floats]:
    def by_class(labels: Rows, rows: NDArray[Any]) -> Floats:
        chosen = csr_array((np.ones(len(rows)), (labels[rows], rows)), shape=(classes, len(labels)))
        return np.asarray((chosen @ weights.T).T)

    everything = np.arange(len(y))
    members, named = by_class(y, everything), by_class(predicted, everything)
    hits = by_class(y, np.flatnonzero(y == predicted))
    recall = np.where(members > 0, hits / members, np.nan)
    there = members + named > 0
    f1 = np.where(there, 2 * hits / (members + named), 0)
    return {
        "accuracy": hits.sum(axis=1) / weights.sum(axis=1),
        "balanced_accuracy": np.nansum(recall, axis=1) / (members > 0).sum(axis=1),
        "f1_macro": f1.sum(axis=1) / there.sum(axis=1),
    }


def _of_margins(positive: NDArray[np.bool_], margins: Floats, weights: Floats) -> dict[str, Floats]:
    order = np.argsort(-margins, kind="stable")
    # Rows of one margin count as one step.
    steps = np.flatnonzero(np.diff(margins[order], prepend=np.inf))
    ordered = weights[:, order]
    hits = np.add.reduceat(ordered * positive[order], steps, axis=1)
    others = np.add.reduceat(ordered * ~positive[order], steps, axis=1)
    above, false_above = hits.cumsum(axis=1), others.cumsum(axis=1)
    all_hits, all_others = above[:, -1], false_above[:, -1]
    precision = np.where(above + false_above > 0, above / (above + false_above), 0)
    return {
        "roc_auc": (others * (above - hits / 2)).sum(axis=1) / (all_hits * all_others),
        "average_precision": (hits * precision).sum(axis=1) / all_hits,
    }


def _of_shares(y: Rows, shares: Floats, weights: Floats) -> dict[str, Floats]:
    total, rows = weights.sum(axis=1), np.arange(len(y))
    # What scikit-learn does for log_loss: no probability is exactly 0.
    own = np.clip(shares[rows, y], LEAST_PROBABILITY, 1)
    brier = (shares * shares).sum(axis=1) - 2 * shares[rows, y] + 1
    surest = shares.argmax(axis=1)
    gap = (surest == y) - shares[rows, surest]
    gaps = csr_array((gap, (_bins(shares[rows, surest]), rows)), shape=(BINS, len(y)))
    return {
        "log_loss": weights @ -np.log(own) / total,
        "brier": weights @ brier / total / (2 if shares.shape[1] == 2 else 1),
        "ece": np.abs(np.asarray(gaps @ weights.T)).sum(axis=0) / total,
    }


def _bins(confidence: Floats) -> Rows:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def reliability(predictions: Predictions) -> list[dict[str, float]]:
    """How sure the head was, and how often it was right, by bins of confidence that hold any row."""
    shares = predictions.shares
    if shares is None:
        return []
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == predictions.y
    bins = _bins(confidence)
    return [
        {
            "rows": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
        }
        for inside in (bins == number for number in np.unique(bins))
    ]


def per_class(predictions: Predictions) -> list[dict[str, Any]]:
    """For each class its rows, and the precision, recall and F1 of the predictions."""
    if predictions.classes is None:
        return []
    found = []
    for place, name in enumerate(predictions.classes.tolist()):
        truly, said = predictions.y == place, predictions.predicted == place
        hits = int((truly & said).sum())
        found.append(
            {
                "class": name,
                "rows": int(truly.sum()),
                "precision": hits / int(said.sum()) if said.any() else None,
                "recall": hits / int(truly.sum()) if truly.any() else None,
                "f1": 2 * hits / int(truly.sum() + said.sum()) if (truly | said).any() else None,
            }
        )
    return found
