"""Views and heads side by side, on the same samples and folds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from features.embedding import Progress
from features.errors import DataError
from features.store import FeatureStore
from pipeline import dataset, heads, intervals, streaming, targets, tuning
from pipeline.dataset import Selection
from pipeline.evaluate import held_out, held_out_by_dummy
from pipeline.folds import SEED, fold
from pipeline.intervals import Score, difference
from pipeline.metrics import LESS_IS_BETTER
from pipeline.targets import Kind
from pipeline.train import EVERYTHING, require_fitting
from pipeline.tuning import Recipe


def compare(
    store: FeatureStore,
    target: str,
    *,
    views: list[str] | None = None,
    names: list[str] | None = None,
    task: Kind | None = None,
    selection: Selection = EVERYTHING,
    folds: int = 5,
    tune: bool = False,
    balanced: bool = False,
    log: bool = False,
    progress: Progress = lambda done, total, busy: None,
) -> dict[str, Any]:
    """Cross-validate every head on every view.

    Parameters
    ----------
    store : FeatureStore
    target : str
    views, names : list of str, optional
        Of views and heads; all by default.
    task : str, optional
    selection : Selection, optional
        Samples that are kept for a test are not looked at.
    folds : int
    tune, balanced, log : bool
        See `pipeline.tuning.Recipe`.
    progress : callable, optional

    Returns
    -------
    dict
        ``leaderboard``, the best first: of each ``view`` and ``head`` its ``scores``, how far it is ``behind`` the best
        on the same resamples, whether that is ``clear``, and what a fit (seconds) and a prediction (seconds for one
        sample) cost. Beside it ``dummy``, ``metric``, ``rows``, and by how much picking the best of so many
        ``flatters``.

    Raises
    ------
    DataError
        If the store or a sample lacks what a view, a head or a target needs.

    Examples
    --------
    >>> found = compare(FeatureStore.open("store"), "label", names=["logreg", "knn"], folds=3)
    >>> found["metric"], sorted(row["head"] for row in found["leaderboard"])
    ('accuracy', ['knn', 'logreg'])
    """
    chosen = [store.pick_view(name) for name in views or store.views()]
    if not chosen:
        raise DataError(f"store {store.root.path} has no view to compare; `permafrost extract` makes them")
    dims = sum(view.dim for view in chosen)
    data = dataset.load(
        store, chosen, store.snapshot(), [target], selection, lambda rows, dim: streaming.never(rows, dims)
    )
    asked = targets.read(data.samples, [target], task or ("regression" if log else None))
    if len(asked) > 1:
        raise DataError(f"column {target!r} holds lists of labels; compare takes one target at a time")
    sought = asked[0]
    every = tuning.candidates(Recipe(sought.task, heads.AUTO, balanced=balanced))
    recipes = [Recipe(sought.task, name, tune, balanced, log=log) for name in names or every]
    for recipe in recipes:
        require_fitting(sought, recipe)
        tuning.candidates(recipe)
    learnt = sought.known & ~data.tested
    # One list of folds, so that all are scored on the same rows.
    parts = fold(data.examples(sought, data.embeddings[chosen[0].name], learnt), folds)
    rows, done, total = [], itertools.count(1), len(chosen) * len(recipes) * folds
    for view in chosen:
        examples = data.examples(sought, data.embeddings[view.name], learnt)
        for recipe in recipes:
            found = held_out(recipe, examples, parts, tick=lambda: progress(next(done), total, ""))
            cost = {"fit_seconds": found.fit_seconds, "predict_seconds": found.predict_seconds}
            rows.append(({"view": view.name, "head": recipe.head} | cost, found.scores()))
    metric = recipes[0].metric
    dummy = intervals.scores(held_out_by_dummy(examples, parts), found.groups, found.fold)
    return {
        "target": target,
        "task": sought.task,
        "metric": metric,
        "rows": {"train": len(examples), "independent": len(np.unique(examples.groups)), "left_out": data.left_out},
        "leaderboard": _ordered(rows, metric),
        "dummy": {name: score.to_json() for name, score in dummy.items()},
        "flatters": _optimism([scores[metric] for _, scores in rows], metric),
        "settings": {"folds": folds, "tune": tune, "balanced": balanced, "log": log, "seed": SEED},
    }


def _ordered(rows: list[tuple[dict[str, Any], dict[str, Score]]], metric: str) -> list[dict[str, Any]]:
    sign = -1 if metric in LESS_IS_BETTER else 1
    rows = sorted(rows, key=lambda row: -sign * row[1][metric].value)
    best, found = rows[0][1][metric], []
    for told, scores in rows:
        behind = difference(best, scores[metric], metric)
        clear = behind["low"] is not None and behind["low"] > 0
        as_json = {name: score.to_json() for name, score in scores.items()}
        found.append(told | {"scores": as_json, "behind": behind, "clear": clear})
    return found


def _optimism(scores: list[Score], metric: str) -> float:
    """By how much the best of several looks better than it is, for having been picked.

    In each resample one is picked, and compared with what it scores on all rows: the bootstrap's estimate of optimism
    (Efron 1983), applied to the choice as in Tsamardinos et al. 2018.
    """
    sign = -1 if metric in LESS_IS_BETTER else 1
    resampled = sign * np.stack([score.resampled for score in scores])
    values = sign * np.array([score.value for score in scores])
    picked = np.nan_to_num(resampled, nan=-np.inf).argmax(axis=0)
    gains = resampled[picked, np.arange(resampled.shape[1])] - values[picked]
    return float(np.nan_to_num(gains).mean())
