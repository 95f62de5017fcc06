"""Heads: a name stands for a scikit-learn pipeline with its scaler inside, and for the settings worth trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from features.errors import DataError
from pipeline.targets import Kind, Task, kind

SEED = 0

Factory = Callable[[], Any]
Grid = dict[str, list[Any]]


def _scaled_target(regressor: Any) -> Any:
    # The regularisation of a support vector machine is in units of the target.
    return TransformedTargetRegressor(regressor, transformer=StandardScaler())


# Embeddings have hundreds of columns, each worth little: scikit-learn's own 100 rounds of 255 bins and all columns take
# eight times as long (800 x 1,280, 20 classes: 19 s) for the same accuracy.
BOOSTING = {"max_iter": 40, "learning_rate": 0.2, "max_bins": 32, "max_features": 0.1, "random_state": SEED}

# The simplest first, which decides between heads that score alike.
HEADS: dict[str, dict[Kind, Factory]] = {
    "logreg": {"classification": lambda: LogisticRegression(C=0.01, max_iter=2000)},
    "ridge": {
        "classification": lambda: RidgeClassifier(alpha=1000.0),
        "regression": lambda: Ridge(alpha=1000.0),
    },
    "linear_svm": {
        "classification": lambda: LinearSVC(C=0.001, dual=True, max_iter=10_000, random_state=SEED),
        "regression": lambda: _scaled_target(LinearSVR(C=0.001, max_iter=10_000, random_state=SEED)),
    },
    # Search trees are of no use in hundreds of dimensions, and a bundle would have to trust them.
    "knn": {
        "classification": lambda: KNeighborsClassifier(algorithm="brute"),
        "regression": lambda: KNeighborsRegressor(algorithm="brute"),
    },
    "tree": {
        "classification": lambda: DecisionTreeClassifier(min_samples_leaf=5, random_state=SEED),
        "regression": lambda: DecisionTreeRegressor(min_samples_leaf=5, random_state=SEED),
    },
    "rbf_svm": {"classification": lambda: SVC(), "regression": lambda: _scaled_target(SVR())},
    "random_forest": {
        "classification": lambda: RandomForestClassifier(300, random_state=SEED),
        "regression": lambda: RandomForestRegressor(300, max_features="sqrt", random_state=SEED),
    },
    "hist_gradient_boosting": {
        "classification": lambda: HistGradientBoostingClassifier(**BOOSTING),
        "regression": lambda: HistGradientBoostingRegressor(**BOOSTING),
    },
}
DEFAULT: dict[Kind, str] = {"classification": "logreg", "regression": "ridge"}
AUTO = "auto"
"""Stands for whichever head does best."""

GRIDS: dict[str, Grid] = {
    "logreg": {"C": [0.0001, 0.001, 0.01, 0.1, 1.0]},
    "ridge": {"alpha": [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0]},
    "linear_svm": {"C": [0.00001, 0.0001, 0.001, 0.01, 0.1]},
    "knn": {"n_neighbors": [1, 3, 5, 10, 20], "weights": ["uniform", "distance"]},
    "tree": {"min_samples_leaf": [1, 5, 20], "max_depth": [3, 6, None]},
    # A width of 1 is one over the mean squared distance between embeddings; see `pipeline.tuning`.
    "rbf_svm": {"C": [0.3, 1.0, 3.0, 10.0, 30.0], "width": [0.5, 2.0]},
    "random_forest": {"min_samples_leaf": [1, 3], "max_features": ["sqrt", 0.2]},
    "hist_gradient_boosting": {"learning_rate": [0.1, 0.2], "max_leaf_nodes": [7, 31]},
}
"""Settings that ``--tune`` tries, of the innermost estimator; all combinations."""


def make(name: str, task: Task, *, balanced: bool = False, log: bool = False) -> Pipeline:
    """A new, unfitted head.

    Parameters
    ----------
    name : str
        One of `HEADS`.
    task : str
    balanced : bool
        Whether rare classes weigh as much as frequent ones.
    log : bool
        Whether quantities are predicted by their logarithm.

    Returns
    -------
    sklearn.pipeline.Pipeline
        A scaler and an estimator, seeded; takes float32 of shape (samples, dim).

    Raises
    ------
    DataError
        If there is no such head, or none for this task, or it knows no class weights.

    Examples
    --------
    >>> make("ridge", "regression", log=True)["head"].regressor
    Ridge...
    >>> make("ridge", "regression", balanced=True)
    Traceback (most recent call last):
    features.errors.DataError: head 'ridge' knows no class weights; use another --head, or leave out --balanced
    """
    fitting = names_for(task)
    if name not in HEADS:
        raise DataError(f"head {name!r} is unknown; use {', '.join([*fitting, AUTO])}")
    if name not in fitting:
        raise DataError(f"head {name!r} is not for {kind(task)}; use {', '.join([*fitting, AUTO])}, or say --task")
    estimator = HEADS[name][kind(task)]()
    if balanced:
        if "class_weight" not in estimator.get_params():
            raise DataError(f"head {name!r} knows no class weights; use another --head, or leave out --balanced")
        estimator.set_params(class_weight="balanced")
    if log:
        estimator = TransformedTargetRegressor(estimator, func=np.log, inverse_func=np.exp)
    # The distance of two normalised embeddings depends on no other, and so can be computed once for all folds.
    return Pipeline([("scale", Normalizer() if name == "rbf_svm" else StandardScaler()), ("head", estimator)])


def names_for(task: Task) -> list[str]:
    """Heads that fit a task, the simplest first.

    Parameters
    ----------
    task : str
        ``binary``, ``multiclass`` or ``regression``.

    Returns
    -------
    list of str

    Examples
    --------
    >>> names_for("regression")[0]
    'ridge'
    """
    return [name for name, factories in HEADS.items() if kind(task) in factories]


def path_to_settings(head: Pipeline) -> str:
    """What stands before the innermost estimator's parameters in those of a head."""
    path, estimator = "head__", head["head"]
    while isinstance(estimator, TransformedTargetRegressor):
        path, estimator = path + "regressor__", estimator.regressor
    return path
