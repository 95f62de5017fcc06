"""What compiled code takes on trust: scikit-learn indexes into trees, support vectors and neighbours unchecked.

Every type in a head may be one of ours and every array as large as it says, and yet a child that lies outside its tree
reads foreign memory, one that is its own parent is walked for ever, and a label beyond the classes is written beyond
the array. Nothing but training checks these, so a head from elsewhere is checked here before it predicts.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble._hist_gradient_boosting.binning import _BinMapper
from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.tree._tree import Tree

_Settings = dict[str, list[Any]]

_FOREST: _Settings = {"n_jobs": [None, -1], "verbose": [0], "n_outputs_": [1]}
_BOOSTING: _Settings = {"_preprocessor": [None], "_in_fit": [False], "verbose": [0]}
_VECTORS: _Settings = {
    "kernel": ["rbf"],
    "_sparse": [False],
    "probability": [False, "deprecated"],
    "_effective_probability": [False],
}
_NEIGHBOURS: _Settings = {
    "weights": ["uniform", "distance"],
    "metric": ["minkowski"],
    "p": [2],
    "metric_params": [None],
    "effective_metric_": ["euclidean"],
    "effective_metric_params_": [{}],
    "_fit_method": ["brute"],
    "outputs_2d_": [False],
    "n_jobs": [None],
}
_LEARNT = {"tree_", "estimators_", "_predictors", "support_vectors_", "_fit_X"}
# By class: what heads of ours say of themselves. Other values lead into other code, or make threads without end.
_SETTINGS: dict[str, _Settings] = {
    "DecisionTreeClassifier": {"n_outputs_": [1]},
    "DecisionTreeRegressor": {"n_outputs_": [1]},
    "RandomForestClassifier": _FOREST,
    "RandomForestRegressor": _FOREST,
    "HistGradientBoostingClassifier": _BOOSTING,
    "HistGradientBoostingRegressor": _BOOSTING,
    "SVC": _VECTORS,
    "SVR": _VECTORS,
    "KNeighborsClassifier": _NEIGHBOURS,
    "KNeighborsRegressor": _NEIGHBOURS,
}


def require_sound(head: Any, dim: int) -> None:
    """Check what compiled code takes on trust in a head that was just built.

    Parameters
    ----------
    head : sklearn.base.BaseEstimator
        Of types that `pipeline.audit` knows.
    dim : int
        Size of the embeddings.

    Raises
    ------
    ValueError
        Saying what is unsound. Whatever else is raised means the same: it lacks what every fitted head has.
    """
    waiting = [head]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list | tuple | dict):
            waiting.extend(part.values() if isinstance(part, dict) else part)
        elif isinstance(part, Tree):
            _require_tree(part, dim)
        elif type(part).__module__.startswith("sklearn."):
            _require_settings(part, dim)
            waiting.extend(vars(part).values())
            if isinstance(part, TreePredictor):
                _require_predictor(part, dim)
            elif isinstance(part, _BinMapper):
                # Sets of categories are indexed by their values.
                _require(not np.any(part.is_categorical_), "categories")
            elif "_predictors" in vars(part):
                widths = {len(each) for each in part._predictors} or {part.n_trees_per_iteration_}
                _require(widths == {part.n_trees_per_iteration_}, "rounds of boosting")
                _require(part._baseline_prediction.shape == (1, part.n_trees_per_iteration_), "the first guess")
            elif "support_vectors_" in vars(part):
                _require_vectors(part, dim)
            elif "_fit_X" in vars(part):
                _require_neighbours(part, dim)


def require_answers(head: Any, classes: list[Any] | None, X: NDArray[np.float32]) -> None:
    """Check that a head answers for each row, and knows the classes that it is said to know.

    Parameters
    ----------
    head : sklearn.base.BaseEstimator
    classes : list or None
        None for quantities.
    X : numpy.ndarray
        float32, shape (rows, dim): embeddings like those that it was trained on.

    Raises
    ------
    ValueError
        If it does not. Whatever else the head raises means the same.
    """
    known = getattr(head, "classes_", None)
    _require((None if known is None else known.tolist()) == classes, "the classes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _require(head.predict(X).shape == (len(X),), "the predictions")
        if hasattr(head, "predict_proba"):
            _require(head.predict_proba(X).shape == (len(X), len(classes or [])), "the probabilities")


def _require(sound: Any, what: str) -> None:
    if not sound:
        raise ValueError(f"{what} of the head do not fit the rest")


def _require_settings(part: Any, dim: int) -> None:
    kind, said = type(part), vars(part)
    _require(not said.keys() & set(dir(kind)), f"the methods of a {kind.__name__}")
    if not said.keys() & _LEARNT:
        return
    for name, values in _SETTINGS.get(kind.__name__, {}).items():
        _require(said.get(name, values[0]) in values, f"{name} of a {kind.__name__}: it and others")
    # Where it is missing, scikit-learn takes as many columns as come.
    _require(said["n_features_in_"] == dim, "the columns")


def _require_tree(tree: Tree, dim: int) -> None:
    # Before its arrays are asked for: they are said to be so long.
    _require(tree.n_outputs == 1 and 0 < tree.node_count == tree.capacity, "the nodes of a tree")
    nodes = tree.__getstate__()["nodes"]
    inner = nodes["left_child"] != -1
    _require_nodes(nodes["left_child"], nodes["right_child"], nodes["feature"], inner, dim)


def _require_predictor(tree: TreePredictor, dim: int) -> None:
    nodes = tree.nodes
    _require(nodes.dtype == PREDICTOR_RECORD_DTYPE and nodes.ndim == 1 and len(nodes), "the nodes of a tree")
    _require(not nodes["is_categorical"].any(), "categories")
    _require_nodes(nodes["left"], nodes["right"], nodes["feature_idx"], nodes["is_leaf"] == 0, dim)


def _require_nodes(
    left: NDArray[Any], right: NDArray[Any], feature: NDArray[Any], inner: NDArray[np.bool_], dim: int
) -> None:
    place = np.arange(len(inner))[inner]
    for child in (left[inner], right[inner]):
        # Both libraries number a child after its parent, so a tree that does is walked to an end.
        _require((child > place).all() and (child < len(inner)).all(), "the children in a tree")
    _require((feature[inner] >= 0).all() and (feature[inner] < dim).all(), "the columns of a tree")


def _require_vectors(part: Any, dim: int) -> None:
    rows, several = len(part.support_vectors_), hasattr(part, "classes_")
    classes = len(part.classes_) if several else 2
    pairs = classes * (classes - 1) // 2 if several else 1
    _require(classes > 1 and part.support_vectors_.shape == (rows, dim), "the support vectors")
    _require(part.support_.shape == (rows,), "the support vectors")
    _require(part._dual_coef_.shape == (classes - 1, rows), "the weights of the support vectors")
    _require(part._intercept_.shape == (pairs,), "the intercepts")
    counts = part._n_support.astype(np.int64)
    _require(counts.shape == (classes,) and (counts >= 0).all(), "the numbers of support vectors")
    _require(not several or counts.sum() == rows, "the numbers of support vectors")


def _require_neighbours(part: Any, dim: int) -> None:
    rows = len(part._fit_X)
    _require(part._fit_X.shape == (rows, dim) and part._y.shape == (rows,), "the neighbours")
    # What is further than all numbers never becomes a neighbour, and leaves its place unset.
    _require(float(np.abs(part._fit_X).max()) < 1e100, "the neighbours")
    _require(type(part.n_neighbors) is int and 1 <= part.n_neighbors <= rows == part.n_samples_fit_, "the neighbours")
    if hasattr(part, "classes_"):
        _require((part._y >= 0).all() and (part._y < len(part.classes_)).all(), "the labels of the neighbours")
