"""One target, judged: a head's scores with their intervals, beside those of its controls, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import DataError
from pipeline import conformal, evaluate, intervals, tuning
from pipeline.blocks import Blocks
from pipeline.evaluate import HeldOut, Tick
from pipeline.folds import Examples, Rows, fold
from pipeline.intervals import Score, difference
from pipeline.metrics import Predictions, per_class, reliability
from pipeline.tuning import Fitted, Recipe

ENOUGH_GROUPED = 0.02
"""Share of the examples that are in a group with another, from which it is told what a random split would have said."""
Controls = dict[str, tuple[str | None, NDArray[np.float32]]]
"""By name: a head in the place of the recipe's, and what it reads, with a row for each training example; a row of NaN
where it has nothing to read."""


def judge(
    recipe: Recipe, train: Examples, test: Examples | None, folds: int, controls: Controls, tick: Tick = lambda: None
) -> tuple[dict[str, Any], Fitted, HeldOut]:
    """Score a recipe on held-out folds and on the test, fit it on all training examples, and compare.

    Returns
    -------
    facts : dict
        What `bundle.json` says of a target.
    fitted : Fitted
    found : HeldOut
    """
    parts = fold(train, folds)
    # Each share of the examples would be read from the file as often as all of them.
    found = evaluate.held_out(recipe, train, parts, curve=not isinstance(train.X, Blocks), tick=tick)
    ours = found.scores()
    beside = {"dummy": intervals.scores(evaluate.held_out_by_dummy(train, parts), found.groups, found.fold)}
    metric = recipe.metric
    compared: dict[str, Any] = {"dummy": difference(ours[metric], beside["dummy"][metric], metric)}
    # What is told from a head without a search or calibration is told of one without.
    plain = _plain(recipe, found)
    base = found if plain == recipe else evaluate.held_out(plain, train, parts)
    for name, (head, X) in controls.items():
        there: Rows = np.flatnonzero(np.isfinite(X).all(axis=1))
        try:
            theirs, mine = _controlled(plain, head, train, X, base, there, folds, tick)
        except DataError as error:
            compared[name] = {
                "rows": len(there),
                "refused": f"{error}" if len(there) else "no image can be read any more",
            }
            continue
        beside[name] = theirs
        compared[name] = difference(mine[metric], theirs[metric], metric) | {"rows": len(there)}
        compared[name] |= {"head": mine[metric].to_json()}
    fitted = _fitted(recipe, train)
    points, doubling = evaluate.learning_curve(found, metric, parts)
    facts: dict[str, Any] = {
        "head": fitted.head,
        "settings": fitted.settings,
        "chosen": [{"head": each.head, "settings": each.settings} for each in found.chosen],
        "metric": metric,
        "log": recipe.log,
        "cross_validation": {"head": _json(ours)} | {name: _json(scores) for name, scores in beside.items()},
        "better_than": compared,
        "learning_curve": points,
        "doubling": doubling,
        "per_class": per_class(found.predictions),
        "reliability": reliability(found.predictions),
        "uncalibrated": _json(_uncalibrated(found)),
        "random_split": _ungrouped(plain, train, base, folds),
        "conformal": conformal.judge(found.predictions, found.fold, recipe.log),
        "seconds": {"fit": found.fit_seconds, "predict": found.predict_seconds},
        "test": None,
    }
    if test is not None:
        facts["test"] = _tested(fitted, train, test)
        if facts["conformal"]:
            said = _said(fitted.estimator, train, test)
            inside, _ = conformal.covered(said, facts["conformal"]["threshold"], recipe.log)
            facts["conformal"]["test_coverage"] = float(inside.mean())
    return facts, fitted, found


def _fitted(recipe: Recipe, train: Examples) -> Fitted:
    with evaluate.one_thread_each():
        return tuning.fit(recipe, tuning.with_distances(recipe, train))


def _said(estimator: Any, train: Examples, test: Examples) -> Predictions:
    return evaluate.predictions(estimator, test, evaluate.labels_of(train, test))


def _tested(fitted: Fitted, train: Examples, test: Examples) -> dict[str, Any]:
    beside = {"head": (fitted.estimator, test), "dummy": (evaluate.dummy(train), evaluate.blind(test))}
    return {
        name: _json(intervals.scores(_said(estimator, train, seen), test.groups))
        for name, (estimator, seen) in beside.items()
    }


def _uncalibrated(found: HeldOut) -> dict[str, Score]:
    if found.uncalibrated is None:
        return {}
    return intervals.scores(found.uncalibrated, found.groups, found.fold)


def _controlled(
    plain: Recipe,
    head: str | None,
    train: Examples,
    X: NDArray[np.float32],
    base: HeldOut,
    there: Rows,
    folds: int,
    tick: Tick,
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Scores of a control, and of the head on the very rows that the control has."""
    mine = train if len(there) == len(train) else train.take(there).loaded()
    parts = fold(mine, folds)
    ours = base if len(there) == len(train) else evaluate.held_out(plain, mine, parts)
    theirs = evaluate.held_out(replace(plain, head=head or plain.head), replace(mine, X=X[there]), parts, tick=tick)
    return theirs.scores(), ours.scores()


def _ungrouped(plain: Recipe, train: Examples, base: HeldOut, folds: int) -> dict[str, Any] | None:
    """The main metric by folds that tear groups apart, and ``instead_of`` which, where there are enough to matter."""
    _, sizes = np.unique(train.groups, return_counts=True)
    if sizes[sizes > 1].sum() < ENOUGH_GROUPED * len(train):
        return None
    loose = replace(train, groups=np.arange(len(train)), times=None)
    scores = evaluate.held_out(plain, loose, fold(loose, folds)).scores()
    honest = base.scores()[plain.metric].to_json()["value"]
    return scores[plain.metric].to_json() | {"instead_of": honest}


def _plain(recipe: Recipe, found: HeldOut) -> Recipe:
    """The same without a search."""
    return replace(recipe, head=found.chosen[0].head, tune=False, calibrate=False)


def _json(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.to_json() for name, score in scores.items()}
