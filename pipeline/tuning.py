"""A head is fitted: as it is, or with the settings, or as the kind of head, that do best inside its own examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_is_fitted, validate_data

from features.errors import DataError
from pipeline import heads
from pipeline.folds import Examples, Fold, within
from pipeline.metrics import MAIN
from pipeline.targets import Task

MOST_DISTANCES = 10_000
"""Examples up to which all distances between them are held: 0.4 GB, and as much again for each core."""
_FLOATS = (np.float64, np.float32)


@dataclass(frozen=True)
class Recipe:
    """What to fit.

    Attributes
    ----------
    task : str
    head : str
        One of `pipeline.heads.HEADS`, or ``auto``: the simplest within one standard error of the best (Breiman et al.
        1984, section 3.4.3).
    tune : bool
        Whether the settings are searched.
    balanced : bool
        Whether rare classes weigh as much as frequent ones.
    calibrate : bool
        Whether probabilities are calibrated: Platt's sigmoid for two classes, a temperature for more.
    log : bool
        Whether quantities are predicted by their logarithm.
    """

    task: Task
    head: str
    tune: bool = False
    balanced: bool = False
    calibrate: bool = False
    log: bool = False

    @property
    def metric(self) -> str:
        """What heads and settings are compared by."""
        return "balanced_accuracy" if self.balanced else MAIN[self.task]


@dataclass(frozen=True)
class Fitted:
    """A fitted head, of which kind it is, and with which settings."""

    head: str
    settings: dict[str, Any]
    estimator: Any


def fit(recipe: Recipe, examples: Examples) -> Fitted:
    """Choose by folds within the examples what there is to choose, then fit on all of them."""
    name, settings = _choose(recipe, examples)
    estimator = built(recipe, name, settings, examples.X)
    if recipe.calibrate:
        return Fitted(name, settings, _calibrated(recipe, estimator, examples))
    return Fitted(name, settings, estimator.fit(examples.X, examples.y))


def _calibrated(recipe: Recipe, estimator: Pipeline, examples: Examples) -> CalibratedClassifierCV:
    """The head and a calibration of it, by Platt 1999 or Guo et al. 2017, on predictions of rows held out."""
    timeless = replace(examples, times=None)
    method = "sigmoid" if recipe.task == "binary" else "temperature"
    # Up to scikit-learn 1.9 the temperature takes integer labels for places in the list of classes; now they are.
    labels, places = np.unique(examples.y, return_inverse=True)
    calibrated = CalibratedClassifierCV(estimator, method=method, cv=within(timeless), ensemble=False).fit(
        examples.X, places
    )
    calibrated.classes_, calibrated.cv = labels, None
    return calibrated


def built(recipe: Recipe, name: str, settings: dict[str, Any], X: NDArray[np.float32]) -> Pipeline:
    """An unfitted head with settings; a width is turned into the kernel's `gamma` for embeddings like these."""
    head = heads.make(name, recipe.task, balanced=recipe.balanced, log=recipe.log)
    given = dict(settings)
    if "width" in given:
        given["gamma"] = _gamma(given.pop("width"), X)
    return head.set_params(**{heads.path_to_settings(head) + key: value for key, value in given.items()})


def with_distances(recipe: Recipe, examples: Examples) -> Examples:
    """The examples with what a search for a kernel needs of them, once for all folds and settings."""
    needed = recipe.tune and recipe.head in ("rbf_svm", heads.AUTO) and len(examples) <= MOST_DISTANCES
    if not needed:
        return examples
    return replace(examples, distances=euclidean_distances(normalize(examples.X), squared=True))


def candidates(recipe: Recipe) -> list[str]:
    """Heads that the recipe allows, the simplest first.

    Raises
    ------
    DataError
        If the head that is asked for is none, or not for the task, or knows no class weights.
    """
    if recipe.head != heads.AUTO:
        heads.make(recipe.head, recipe.task, balanced=recipe.balanced)
        return [recipe.head]
    names = heads.names_for(recipe.task)
    if not recipe.balanced:
        return names
    return [name for name in names if "class_weight" in heads.make(name, recipe.task)["head"].get_params()]


def _choose(recipe: Recipe, examples: Examples) -> tuple[str, dict[str, Any]]:
    names = candidates(recipe)
    if len(names) == 1 and not recipe.tune:
        return names[0], {}
    folds = within(examples)
    found = {name: _searched(recipe, name, examples, folds) for name in names}
    best = max((scores for _, scores in found.values()), key=np.mean)
    enough = best.mean() - best.std(ddof=1) / np.sqrt(len(best))
    chosen = next(name for name in names if found[name][1].mean() >= enough)
    return chosen, found[chosen][0]


def _searched(
    recipe: Recipe, name: str, examples: Examples, folds: list[Fold]
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """The best setting of one head, and its score in each fold."""
    grid: heads.Grid = heads.GRIDS[name] if recipe.tune else {}
    head, X = heads.make(name, recipe.task, balanced=recipe.balanced, log=recipe.log), examples.X
    path = heads.path_to_settings(head)
    tried = {path + key: values for key, values in grid.items() if key != "width"}
    if "width" in grid and examples.distances is not None:
        head = Pipeline([("kernel", _Kernel()), ("head", head.set_params(**{f"{path}kernel": "precomputed"})["head"])])
        tried, X = tried | {"kernel__width": grid["width"]}, examples.distances
    elif "width" in grid:
        widths = {_gamma(width, X): width for width in grid["width"]}
        tried[f"{path}gamma"] = list(widths)
    # A setting that so few examples do not allow, such as more neighbours than there are, is the worst.
    search = GridSearchCV(head, tried, scoring=recipe.metric, cv=folds, refit=False, error_score=np.nan)
    results = search.fit(X, examples.y).cv_results_
    means = np.nan_to_num(results["mean_test_score"], nan=-np.inf)
    place = int(means.argmax())
    if not np.isfinite(means[place]):
        raise DataError(f"{len(examples)} examples are too few to tune or choose a head by; label more, or do without")
    won = {key.rpartition("__")[2]: value for key, value in results["params"][place].items()}
    # What the search calls a gamma is the width that made it.
    settings = {key: won[key] if key in won else widths[won["gamma"]] for key in grid}
    return settings, np.array([results[f"split{number}_test_score"][place] for number in range(len(folds))])


def _gamma(width: float, X: NDArray[np.float32]) -> float:
    """A width in units of the mean squared distance between normalised embeddings."""
    return width / (2 * float(normalize(X).var(axis=0).sum()))


class _Kernel(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian kernel of squared distances; stands in a search for what the head itself computes, and is never saved.

    A width of 1 is one over the mean squared distance.
    """

    def __init__(self, width: float = 1.0):
        self.width = width

    def fit(self, X: NDArray[np.float32], y: Any = None) -> _Kernel:
        """Take the unit of the width from squared distances of shape (examples, examples)."""
        X = validate_data(self, X, dtype=_FLOATS)
        if X.shape[0] != X.shape[1]:
            raise ValueError(f"distances between examples are a square matrix, not one of shape {X.shape}")
        self.unit_ = float(X.mean())
        return self

    def transform(self, X: NDArray[np.float32]) -> NDArray[np.float64]:
        """Kernel of squared distances, of shape (examples, fitted examples)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_FLOATS, reset=False)
        return np.asarray(np.exp(X * (-self.width / self.unit_), dtype=np.float64))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags
