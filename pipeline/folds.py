"""Folds: which examples a head is fitted on and which it is scored on, so that the score is that of new images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

from features.errors import DataError
from pipeline.blocks import Blocks
from pipeline.targets import Task

SEED = 0
FOLDS_WITHIN = 3
MOST_WEIGHED = 100_000
"""Groups up to which each is put where it evens out the classes best, which takes time for each of them."""

Rows = NDArray[np.int64]
Fold = tuple[Rows, Rows]
"""The rows to fit on, and the rows to score."""


@dataclass(frozen=True)
class Examples:
    """Embeddings with their labels, and what must not be separated.

    Attributes
    ----------
    X : numpy.ndarray or Blocks
        float32, shape (examples, dim).
    y : numpy.ndarray
        Labels or quantities, shape (examples,).
    task : str
    groups : numpy.ndarray
        int64, shape (examples,): equal for those that must share a fold.
    times : numpy.ndarray or None
        Sortable, shape (examples,); where given, a head is only ever scored on what comes after what it has seen.
    distances : numpy.ndarray or None
        float32, shape (examples, examples): squared, between the normalised embeddings.
    """

    X: NDArray[np.float32] | Blocks
    y: NDArray[Any]
    task: Task
    groups: Rows
    times: NDArray[Any] | None = None
    distances: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Examples:
        """Some of them."""
        times = None if self.times is None else self.times[rows]
        distances = None if self.distances is None else self.distances[np.ix_(rows, rows)]
        return replace(self, X=self.X[rows], y=self.y[rows], groups=self.groups[rows], times=times, distances=distances)

    def loaded(self) -> Examples:
        """The same in memory."""
        return replace(self, X=np.asarray(self.X))


def fold(examples: Examples, folds: int) -> list[Fold]:
    """Shuffled folds, stratified by class; groups stay whole. With times, each fold is scored from its past alone.

    Raises
    ------
    DataError
        If a class, or the data, has fewer members than there are folds, or a class has no two independent ones.
    """
    if folds < 2:
        raise DataError(f"{folds} folds cannot be cross-validated; use --folds 2 or more")
    independent = len(np.unique(examples.groups))
    if independent < folds or (examples.times is not None and len(examples) <= folds):
        raise DataError(f"{independent} independent training images are too few for {folds} folds; use fewer --folds")
    if examples.task != "regression":
        _require_members(examples, folds)
    if examples.times is not None:
        return _in_time(examples, folds)
    return _shuffled(examples, folds)


def within(examples: Examples) -> list[Fold]:
    """Folds within a fold, for what is chosen or calibrated there: `FOLDS_WITHIN`, or as many as the examples allow.

    Raises
    ------
    DataError
        If any of them would be left without a second class.
    """
    folds = min(FOLDS_WITHIN, len(np.unique(examples.groups)))
    if folds < 2 or (examples.times is not None and len(examples) <= folds):
        raise DataError("a fold has no two independent training images to choose or calibrate by; use fewer --folds")
    found = _in_time(examples, folds) if examples.times is not None else _shuffled(examples, folds)
    if examples.task != "regression" and any(len(np.unique(examples.y[fit])) < 2 for fit, _ in found):
        raise DataError("a class has too few independent images to tune or calibrate inside the folds; label more")
    return found


def _shuffled(examples: Examples, folds: int) -> list[Fold]:
    options = {"n_splits": folds, "shuffle": True, "random_state": SEED}
    X, stratified = np.empty((len(examples), 0), np.float32), examples.task != "regression"
    first, group = np.unique(examples.groups, return_index=True, return_inverse=True)[1:]
    if MOST_WEIGHED < len(first) < len(examples):
        # So many groups even out by themselves; each goes where its first example does.
        firsts = replace(examples, X=X[first], y=examples.y[first], groups=examples.groups[first], times=None)
        number = np.empty(len(first), np.int64)
        for place, (_, score) in enumerate(_shuffled(firsts, folds)):
            number[score] = place
        of = number[group]
        return [(np.flatnonzero(of != place), np.flatnonzero(of == place)) for place in range(folds)]
    if len(first) < len(examples):
        grouped = StratifiedGroupKFold if stratified else GroupKFold
        return list(grouped(**options).split(X, examples.y, examples.groups))
    return list((StratifiedKFold if stratified else KFold)(**options).split(X, examples.y))


def part(examples: Examples, share: float) -> Rows:
    """A random share of the groups of each class, the larger always containing the smaller; at least one of each."""
    shuffled = np.random.default_rng(SEED).permutation(len(examples))
    frame = pd.DataFrame({"row": shuffled, "group": examples.groups[shuffled]})
    frame["class"] = 0 if examples.task == "regression" else examples.y[shuffled]
    firsts = frame.drop_duplicates("group")
    place = firsts.groupby("class").cumcount()
    members = firsts.groupby("class")["group"].transform("size")
    kept = firsts.loc[place < np.maximum(1, np.ceil(share * members)), "group"]
    return np.sort(frame.loc[frame["group"].isin(kept), "row"].to_numpy())


def _in_time(examples: Examples, folds: int) -> list[Fold]:
    times = examples.times
    assert times is not None
    order = np.argsort(times, kind="stable")
    found = []
    for _, later in TimeSeriesSplit(folds).split(order):
        score = order[later]
        # What happened at the very time of a scored row is not its past, and a copy of it is no evidence.
        before = (times < times[score].min()) & ~np.isin(examples.groups, examples.groups[score])
        fit = np.flatnonzero(before)
        if not len(fit) or (examples.task != "regression" and len(np.unique(examples.y[fit])) < 2):
            raise DataError(
                f"before {times[score].min()} there are {len(fit)} training images, too few for {folds} folds in time; "
                "use fewer --folds"
            )
        found.append((fit, np.sort(score)))
    return found


def _require_members(examples: Examples, folds: int) -> None:
    names, place = np.unique(examples.y, return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"all {len(examples)} training samples are of class {str(names[0])!r}; a head needs two classes"
        )
    members = np.bincount(place)
    _, group = np.unique(examples.groups, return_inverse=True)
    groups = np.bincount(np.unique(group * len(names) + place) % len(names))
    for counts, least, lack in (
        (members, folds, f"fewer members than the {folds} folds"),
        (groups, 2, "only one member, or copies and groups that count as one"),
    ):
        rare = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < least]
        if rare:
            raise DataError(
                f"{len(rare)} of {len(names)} classes have {lack}: {', '.join(rare[:5])}; "
                "use fewer --folds, or leave those classes out with --where"
                + (", or say --task regression" if examples.y.dtype.kind in "if" else "")
            )
