"""Heads: a name stands for a scikit-learn pipeline with its scaler inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from features.errors import DataError
from pipeline.dataset import Task

SEED = 0

Factory = Callable[[], Any]


def _scaled_target(regressor: Any) -> Any:
    # The regularisation of a support vector machine is in units of the target.
    return TransformedTargetRegressor(regressor, transformer=StandardScaler())


HEADS: dict[str, dict[Task, Factory]] = {
    "logreg": {"classification": lambda: LogisticRegression(C=0.01, max_iter=2000)},
    "linear_svm": {
        "classification": lambda: LinearSVC(C=0.001, dual=True, max_iter=10_000, random_state=SEED),
        "regression": lambda: _scaled_target(LinearSVR(C=0.001, max_iter=10_000, random_state=SEED)),
    },
    "rbf_svm": {"classification": lambda: SVC(), "regression": lambda: _scaled_target(SVR())},
    "tree": {
        "classification": lambda: DecisionTreeClassifier(min_samples_leaf=5, random_state=SEED),
        "regression": lambda: DecisionTreeRegressor(min_samples_leaf=5, random_state=SEED),
    },
    "random_forest": {
        "classification": lambda: RandomForestClassifier(300, n_jobs=-1, random_state=SEED),
        "regression": lambda: RandomForestRegressor(300, max_features="sqrt", n_jobs=-1, random_state=SEED),
    },
    "hist_gradient_boosting": {
        "classification": lambda: HistGradientBoostingClassifier(random_state=SEED),
        "regression": lambda: HistGradientBoostingRegressor(random_state=SEED),
    },
    # Search trees are of no use in hundreds of dimensions, and a bundle would have to trust them.
    "knn": {
        "classification": lambda: KNeighborsClassifier(algorithm="brute"),
        "regression": lambda: KNeighborsRegressor(algorithm="brute"),
    },
    "ridge": {
        "classification": lambda: RidgeClassifier(alpha=1000.0),
        "regression": lambda: Ridge(alpha=1000.0),
    },
}
DEFAULT: dict[Task, str] = {"classification": "logreg", "regression": "ridge"}


def make(name: str, task: Task) -> Pipeline:
    """A new, unfitted head.

    Parameters
    ----------
    name : str
        One of `HEADS`.
    task : str

    Returns
    -------
    sklearn.pipeline.Pipeline
        A scaler and an estimator, seeded; takes float32 of shape (samples, dim).

    Raises
    ------
    DataError
        If there is no such head, or none for this task.
    """
    fitting = [known for known, factories in HEADS.items() if task in factories]
    if name not in HEADS:
        raise DataError(f"head {name!r} is unknown; use {', '.join(fitting)}")
    if name not in fitting:
        raise DataError(f"head {name!r} is not for {task}; use {', '.join(fitting)}, or say --task")
    return Pipeline([("scale", StandardScaler()), ("head", HEADS[name][task]())])
