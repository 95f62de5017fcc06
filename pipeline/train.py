"""From a store to a bundle: data set, cross-validation beside controls, fit, test."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features import samples
from features.embedding import Progress
from features.errors import DataError, redacted
from features.store import FeatureStore, Snapshot
from features.views import UNTRAINED, View
from pipeline import (
    atlas,
    bundle,
    controls,
    dataset,
    drift,
    evaluate,
    galleries,
    heads,
    multilabel,
    page,
    problems,
    streaming,
    targets,
    thumbnails,
    tuning,
)
from pipeline.dataset import Dataset, Selection
from pipeline.evaluate import HeldOut, Tick
from pipeline.folds import SEED, fold
from pipeline.judge import Controls, judge
from pipeline.metrics import Predictions
from pipeline.targets import Kind, Target
from pipeline.tuning import Recipe

LIBRARIES = ("permafrost", "scikit-learn", "numpy", "skops")
MOST_FILES = 2000
"""That the file control looks at where embeddings are read block by block: forests take memory for each."""
EVERYTHING = Selection()


def train(
    store: FeatureStore,
    target: str | list[str],
    out: Path,
    *,
    view: str | None = None,
    head: str | None = None,
    task: Kind | None = None,
    selection: Selection = EVERYTHING,
    folds: int = 5,
    tune: bool = False,
    balanced: bool = False,
    calibrate: bool = False,
    log: bool = False,
    with_controls: bool = False,
    with_images: bool = True,
    with_joblib: bool = False,
    snapshot: int | None = None,
    device: str = "auto",
    stream: bool | None = None,
    progress: Progress = lambda done, total, busy: None,
) -> dict[str, Any]:
    """Cross-validate a head, fit it on every training row, test it, and save it as a bundle.

    Parameters
    ----------
    store : FeatureStore
    target : str or list of str
        Columns of the samples, or of the labels, to predict. Each gets a head of its own.
    out : pathlib.Path
        Where the bundle goes; an older bundle there is replaced.
    view : str, optional
        Needed where the store has more than one.
    head : str, optional
        One of `pipeline.heads.HEADS`, or ``auto``; by default logreg for classes and ridge for quantities, or sgd where
        embeddings are read block by block.
    task : str, optional
        ``classification`` or ``regression``; by default read off each target, unless `log` tells.
    selection : Selection, optional
        Which samples to train and test on, and what must not be separated.
    folds : int
    tune, balanced, calibrate, log : bool
        See `pipeline.tuning.Recipe`.
    with_controls : bool
        Whether to read up to 1,000 images again, for controls that know pixels but no backbone, and the backbone but
        no training.
    with_images : bool
        Whether the report shows images, which are read again for it.
    with_joblib : bool
        Whether the bundle holds ``head.joblib`` too: the estimator, or a dict of them by target.
    snapshot : int, optional
        Number of the state of the listing to train on; the newest by default.
    device : str
        For the controls.
    stream : bool, optional
        Whether the embeddings are read block by block instead of held in memory; by default where they would not fit
        there. Only scores are then of all samples; everything else that the report tells is of a random sample.
    progress : callable, optional
        Told of the folds that are done.

    Returns
    -------
    dict
        The content of `bundle.json`.

    Raises
    ------
    DataError
        If the store does not carry what training needs.

    Examples
    --------
    >>> store = FeatureStore.open("store")
    >>> facts = train(store, "label", Path("trained"), selection=Selection(split="split"), folds=3)
    >>> (target,) = facts["targets"]
    >>> target["head"], target["classes"], target["rows"]["train"], target["rows"]["test"]
    ('logreg', ['blue', 'green', 'red'], 18, 6)
    >>> sorted(target["cross_validation"]["head"]["accuracy"])
    ['folds', 'high', 'low', 'value']
    """
    bundle.require_free(out)
    names = [target] if isinstance(target, str) else target
    chosen, listing = store.pick_view(view), store.snapshot(snapshot)

    def in_blocks(rows: int, dim: int) -> bool:
        return streaming.chosen(stream, rows, dim, head, tune=tune, calibrate=calibrate, controls=with_controls)

    data = dataset.load(store, [chosen], listing, names, selection, in_blocks, out.parent)
    seen = data.in_memory()
    asked = targets.read(data.samples, names, task or ("regression" if log else None))
    if data.streamed:
        for each in asked:
            streaming.require_room(len(data), 1 if each.task == "regression" else len(np.unique(each.y[each.known])))
        # All that is known of five million samples takes a gigabyte.
        listing = dataclasses.replace(listing, samples=samples.empty())
        data = dataclasses.replace(data, samples=data.samples[["id"]])
    recipes = {}
    for each in asked:
        named = head or (heads.STREAMED if data.streamed else heads.DEFAULT[targets.kind(each.task)])
        recipes[each.name] = Recipe(each.task, named, tune, balanced, calibrate, log)
        require_fitting(each, recipes[each.name])
        tuning.candidates(recipes[each.name])
        # Before the first of them is fitted.
        learnt = each.known & ~data.tested
        try:
            fold(data.examples(each, data.embeddings[chosen.name], learnt), folds)
        except DataError as error:
            raise DataError(f"target {each.name!r}: {error}" if len(asked) > 1 else f"{error}") from None
    beside = _controls(data, seen, chosen, with_controls, device)
    done, total = itertools.count(1), len(asked) * folds * (1 + len(beside))

    def tick() -> None:
        progress(next(done), total, "")

    judged: list[dict[str, Any]] = []
    fitted, held_out, errors = dict[str, Any](), dict[str, HeldOut](), list[pd.DataFrame]()
    for each in asked:
        facts, fit, held_out[each.name], unlikely = _judged(
            each, recipes[each.name], data, seen, chosen, beside, folds, tick
        )
        judged.append(facts)
        fitted[each.name] = fit
        errors.append(unlikely)
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": names,
        "targets": judged,
        "together": multilabel.scores(held_out),
        "view": chosen.to_json(),
        "store": store.root.url,
        "snapshot": {"number": listing.number, "digest": listing.digest, "pinned": _pin(store, listing, out)},
        "settings": {
            "head": head,
            "task": task,
            "folds": folds,
            "tune": tune,
            "balanced": balanced,
            "calibrate": calibrate,
            "log": log,
            "controls": with_controls,
            "streaming": data.streamed,
            "seed": SEED,
            **dataclasses.asdict(selection),
            "labels": selection.labels and redacted(selection.labels),
        },
        "rows": _rows(data) | {"seen": len(seen)},
        "labels": data.labels,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    X, learnt = np.asarray(seen.embeddings[chosen.name]), ~seen.tested
    wrong = problems.Problems(
        pd.concat(errors),
        problems.outliers(seen.samples, X),
        problems.near_duplicates(seen.samples, seen.groups.pairs),
    )
    wrong.outliers["tested"] = seen.tested[wrong.outliers.index]
    for side in ("first", "second"):
        wrong.near_duplicates[f"{side}_tested"] = seen.tested[wrong.near_duplicates[side]]
    facts["problems"] = wrong.counts()
    found = {
        each.name: _of_seen(each, data, seen, held_out[each.name].rows, held_out[each.name].predictions)
        for each in asked
    }
    drawn = atlas.drawn(X, np.flatnonzero(learnt))
    shown = galleries.shown(galleries.of_training(seen.samples, found, wrong).values(), drawn)
    pictures = thumbnails.read(seen.samples, shown) if with_images else None
    pages = page.of_training(facts, seen.samples, found, wrong, drawn, pictures)
    reference = drift.reference(X[learnt], seen.groups.of[learnt])
    return bundle.save(out, fitted, facts, pages | wrong.files(), reference, with_joblib)


def _of_seen(
    target: Target, data: Dataset, seen: Dataset, rows: NDArray[np.int64], said: Predictions
) -> tuple[NDArray[np.int64], Predictions]:
    """What was said of training examples that are in memory, and their places there."""
    places = np.flatnonzero(target.known & ~data.tested)[rows]
    kept = np.isin(places, seen.places)
    return np.searchsorted(seen.places, places[kept]), said.take(kept)


def require_fitting(target: Target, recipe: Recipe) -> None:
    """Check that a recipe is for a target.

    Raises
    ------
    DataError
        If an option of it is for another task, or a logarithm is asked of what is not above 0.
    """
    if recipe.task == "regression" and (recipe.balanced or recipe.calibrate):
        raise DataError(f"{target.name!r} is a quantity; --balanced and --calibrate are for classes")
    if recipe.task != "regression" and recipe.log:
        raise DataError(f"{target.name!r} has classes; --log is for quantities")
    if not target.known.any():
        raise DataError(f"no sample has a value for {target.name!r}")
    least = target.y[target.known].min() if recipe.log else 1
    if least <= 0:
        raise DataError(f"{target.name!r} goes down to {least:g}; --log is for quantities above 0")


def _judged(
    target: Target,
    recipe: Recipe,
    data: Dataset,
    seen: Dataset,
    view: View,
    beside: Controls,
    folds: int,
    tick: Tick,
) -> tuple[dict[str, Any], Any, HeldOut, pd.DataFrame]:
    X, learnt, tested = data.embeddings[view.name], target.known & ~data.tested, target.known & data.tested
    train = data.examples(target, X, learnt)
    test = data.examples(target, X, tested) if tested.any() else None
    mine = {name: (head, matrix[learnt]) for name, (head, matrix) in beside.items()}
    facts, fitted, found = judge(recipe, train, test, folds, mine, tick)
    told = {
        "name": target.name,
        "task": target.task,
        "classes": None if target.task == "regression" else fitted.estimator.classes_.tolist(),
        "rows": {
            "train": len(train),
            "independent": len(np.unique(train.groups)),
            "test": 0 if test is None else len(test),
            "unlabelled": int((~target.known).sum()),
        },
    }
    said, told["doubted_by"] = found.predictions, facts["head"]
    if said.classes is not None and said.shares is None:
        # Labels are doubted by probabilities.
        told["doubted_by"] = doubting = heads.DEFAULT["classification"]
        said = evaluate.held_out(Recipe(target.task, doubting), train, fold(train, folds)).predictions
    places, said = _of_seen(target, data, seen, found.rows, said)
    errors = problems.label_errors(seen.samples, target.name, places, said, recipe.log)
    # Who knows nothing doubts at random.
    errors["likely_error"] &= (facts["better_than"]["dummy"]["low"] or 0) > 0
    return told | facts, fitted.estimator, found, errors


def _controls(data: Dataset, seen: Dataset, view: View, with_images: bool, device: str) -> Controls:
    few = np.arange(len(seen))
    if data.streamed:
        few = np.sort(np.random.default_rng(SEED).permutation(few)[:MOST_FILES])
    files = controls.file_facts(seen.samples.iloc[few])
    found: Controls = {"file": ("random_forest", _all_rows(files, seen.places[few], len(data)))}
    if with_images:
        trained = np.flatnonzero(~data.tested)
        rows = trained[controls.bounded(data.samples.loc[~data.tested])]
        some = data.samples.loc[rows]
        found["pixels"] = ("random_forest", _all_rows(controls.pixels(some), rows, len(data)))
        if view.request.weights != UNTRAINED:
            found["untrained"] = (None, _all_rows(controls.untrained(some, view, device), rows, len(data)))
    return found


def _all_rows(values: NDArray[np.float32], rows: NDArray[np.int64], total: int) -> NDArray[np.float32]:
    found = np.full((total, values.shape[1]), np.nan, np.float32)
    found[rows] = values
    return found


def _rows(data: Dataset) -> dict[str, Any]:
    overlap = data.overlap()
    return {
        "train": int((~data.tested).sum()),
        "test": int(data.tested.sum()),
        "left_out": data.left_out,
        "test_in_the_past": bool(
            data.times is not None
            and data.tested.any()
            and data.times[data.tested].min() <= data.times[~data.tested].max()
        ),
        "copies": data.groups.copies,
        "near_duplicates": data.groups.near,
        "overlap": len(overlap),
        "overlapping": overlap[:5],
    }


def _pin(store: FeatureStore, snapshot: Snapshot, out: Path) -> bool:
    try:
        store.pin(snapshot, str(out.absolute()))
    except OSError:
        # Whoever may only read a store can train on it all the same.
        return False
    return True
