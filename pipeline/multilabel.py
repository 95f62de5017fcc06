"""Several binary targets of the same samples, scored together."""

from __future__ import annotations

import numpy as np

from pipeline.evaluate import HeldOut
from pipeline.intervals import Score, limits


def scores(found: dict[str, HeldOut]) -> dict[str, dict[str, float | None]] | None:
    """Mean average precision and macro F1 over the labels, by out-of-fold predictions.

    Returns
    -------
    dict or None
        By metric its ``value``, ``low`` and ``high``; None unless there are several targets, all with two classes.
    """
    each = [held.scores() for held in found.values()]
    metrics = [name for name in ("average_precision", "roc_auc") if all(name in own for own in each)]
    if len(each) < 2 or not metrics:
        return None
    return {f"mean_{name}": _mean([own[name] for own in each]) for name in metrics}


def _mean(own: list[Score]) -> dict[str, float | None]:
    value = float(np.mean([score.value for score in own]))
    resampled = np.stack([score.resampled for score in own])
    low, high = limits(resampled.mean(axis=0), value, own[0].wider)
    return Score(value, max(0.0, low), min(1.0, high), [], resampled[0]).to_json()
