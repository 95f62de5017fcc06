"""Conformal prediction: sets of classes, or ranges, that hold the truth as often as they say.

The threshold is a quantile of how badly held-out predictions fitted (split conformal prediction, Vovk et al. 2005; for
classes the least ambiguous sets of Sadinle, Lei and Wasserman 2019, which MAPIE calls LAC; held out in folds as in
Vovk's cross-conformal prediction, 2015).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import Predictions

LEVEL = 0.9

Floats = NDArray[np.float64]


def threshold(predictions: Predictions, level: float = LEVEL, log: bool = False) -> float | None:
    """The least misfit that so many of the held-out examples, and one more, do not exceed.

    Parameters
    ----------
    predictions : Predictions
        Held out.
    level : float
        Share, from 0 to 1, of the truths that sets or ranges shall hold.
    log : bool
        Whether distances are those of logarithms.

    Returns
    -------
    float or None
        For classes 1 less a probability; for quantities a distance, of logarithms if `log`. None if the head knows no
        probabilities, or there are too few examples to say.

    Examples
    --------
    >>> y = np.arange(1.0, 20.0)
    >>> threshold(Predictions(y, y + np.linspace(-1, 1, 19)), level=0.8)
    0.888...
    """
    found = _misfit(predictions, log)
    if found is None:
        return None
    rank = int(np.ceil((len(found) + 1) * level))
    return float(np.sort(found)[rank - 1]) if rank <= len(found) else None


def sets(shares: Floats, misfit: float) -> NDArray[np.bool_]:
    """Which classes belong to each set, shape (rows, classes); one may be empty, where no class fits.

    Parameters
    ----------
    shares : numpy.ndarray
        Probabilities, shape (rows, classes).
    misfit : float
        See `threshold`.

    Returns
    -------
    numpy.ndarray
        bool, shape (rows, classes).

    Examples
    --------
    >>> sets(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]), misfit=0.6).tolist()
    [[True, False], [True, True], [False, True]]
    """
    return shares >= 1 - misfit


def ranges(predicted: Floats, misfit: float, log: bool = False) -> tuple[Floats, Floats]:
    """Lower and upper ends of each range.

    Parameters
    ----------
    predicted : numpy.ndarray
        Shape (rows,), in the unit of the target.
    misfit : float
        See `threshold`.
    log : bool
        Whether it is a distance of logarithms.

    Returns
    -------
    low, high : numpy.ndarray
        float64, shape (rows,), in the unit of the target.

    Examples
    --------
    >>> low, high = ranges(np.array([10.0, 20.0]), misfit=1.5)
    >>> low.tolist(), high.tolist()
    ([8.5, 18.5], [11.5, 21.5])
    """
    if log:
        return predicted * np.exp(-misfit), predicted * np.exp(misfit)
    return predicted - misfit, predicted + misfit


def judge(predictions: Predictions, fold: NDArray[np.int64], log: bool = False) -> dict[str, Any] | None:
    """The threshold, and how sets or ranges do on the examples of each fold with that of the others.

    Returns
    -------
    dict or None
        ``level``, ``threshold``, ``coverage``, and ``size``: classes in a set, or width of a range, on average.
    """
    misfit = threshold(predictions, log=log)
    if misfit is None:
        return None
    inside, sizes = np.zeros(len(predictions), bool), np.zeros(len(predictions))
    for number in np.unique(fold):
        mine, others = predictions.take(fold == number), predictions.take(fold != number)
        theirs = threshold(others, log=log)
        inside[fold == number], sizes[fold == number] = covered(mine, misfit if theirs is None else theirs, log)
    return {"level": LEVEL, "threshold": misfit, "coverage": float(inside.mean()), "size": float(sizes.mean())}


def covered(predictions: Predictions, misfit: float, log: bool = False) -> tuple[NDArray[np.bool_], Floats]:
    """For each row whether its set or range holds the truth, and how large it is."""
    if predictions.shares is not None:
        chosen = sets(predictions.shares, misfit)
        return chosen[np.arange(len(predictions)), predictions.y], chosen.sum(axis=1).astype(float)
    low, high = ranges(predictions.predicted, misfit, log)
    return (low <= predictions.y) & (predictions.y <= high), high - low


def _misfit(predictions: Predictions, log: bool) -> Floats | None:
    if predictions.classes is None:
        if log:
            return np.asarray(np.abs(np.log(predictions.y) - np.log(predictions.predicted)))
        return np.asarray(np.abs(predictions.y - predictions.predicted))
    if predictions.shares is None:
        return None
    return np.asarray(1 - predictions.shares[np.arange(len(predictions)), predictions.y])
