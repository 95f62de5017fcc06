"""Heads that learn block by block: when that is needed, what it rules out, and how it is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.class_weight import compute_class_weight

from features.errors import DataError
from pipeline.blocks import Blocks
from pipeline.heads import STREAMED

COPIES = 3
"""Of the embeddings that a head takes beside them while it is fitted in memory: a fold, scaled, and once more."""
SHARE = 0.5
"""Of the memory that these may take."""
STEPS = 1_000_000
"""Examples after which stochastic gradient descent has converged, by scikit-learn's guide; of fewer, several passes."""
MOST_PASSES = 100


def bearable(dim: int) -> int:
    """Rows of which the float32 embeddings, and what training makes of them, take half of the memory."""
    return int(SHARE * memory() / (COPIES * 4 * dim))


def needed(rows: int, dim: int) -> bool:
    """Whether embeddings, and what training makes of them, would take more than half of the memory."""
    return rows > bearable(dim)


def require_room(rows: int, classes: int) -> None:
    """Check that memory holds what a head, a dummy and a control say of each row: a float32 for each class.

    Raises
    ------
    DataError
        If it does not.
    """
    if COPIES * 4 * rows * classes > memory():
        raise DataError(f"probabilities of {classes:,} classes for {rows:,} samples do not fit in memory; use --where")


def memory(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may take: the machine's, or the limit of a control group that it is in."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = groups / mine.read_text().rpartition("::/")[2].strip()
    except OSError:
        return most
    for folder in (group, *group.parents):
        for name in ("memory.max", "memory/memory.limit_in_bytes"):
            try:
                most = min(most, int((folder / name).read_text()))
            # No such file, or "max".
            except (OSError, ValueError):
                continue
    return most


def chosen(asked: bool | None, rows: int, dim: int, head: str | None, **options: bool) -> bool:
    """Whether to read embeddings block by block, as asked or as needed, once it is clear that the rest can be done so.

    Raises
    ------
    DataError
        Naming the head, or the option, that needs all of them at once.
    """
    if not (needed(rows, dim) if asked is None else asked):
        return False
    size = f"{rows:,} embeddings of {dim:,} numbers are read block by block"
    if head not in (None, STREAMED):
        raise DataError(f"{size}, and head {head!r} needs all at once; use --head {STREAMED}, or --no-streaming")
    for option, wanted in options.items():
        if wanted:
            raise DataError(f"{size}, and --{option} needs all at once; leave it out, or use --no-streaming")
    return True


def never(rows: int, dim: int) -> bool:
    """Never read embeddings block by block.

    Raises
    ------
    DataError
        If they, and what is made of them, would take more than there is of memory.
    """
    if COPIES * 4 * rows * dim > memory():
        size = f"{rows:,} embeddings of {dim:,} numbers, with what is made of them, take"
        had = f"{COPIES * 4 * rows * dim / 2**30:.1f} GiB of memory, and there are {memory() / 2**30:.1f}"
        raise DataError(f"{size} {had}; choose fewer with --where, or a smaller view")
    return False


def fit(head: Pipeline, X: Blocks, y: NDArray[Any]) -> Pipeline:
    """Fit a head to a matrix in a file: first what scales it, then by stochastic gradient descent over the blocks.

    Parameters
    ----------
    head : sklearn.pipeline.Pipeline
        Unfitted; the last step has ``partial_fit``, as has every other that learns anything from the rows.
    X : Blocks
    y : numpy.ndarray
        Labels or quantities, shape (rows,).
    """
    *steps, (_, last) = head.steps
    for number, (_, step) in enumerate(steps):
        for _, some in X:
            if not hasattr(step, "partial_fit"):
                # It learns nothing but how many columns there are.
                step.fit(_through(steps[:number], some))
                break
            step.partial_fit(_through(steps[:number], some))
    model, y = _started(last, y)
    # A column of ones: what scikit-learn (1.9) averages, it does not carry an intercept over from block to block.
    learner, known = clone(model).set_params(fit_intercept=False), dict[str, Any]()
    if hasattr(model, "class_weight"):
        known = {"classes": np.unique(y)}
    if known and model.class_weight == "balanced":
        # It cannot be read off a block.
        weights = compute_class_weight("balanced", classes=known["classes"], y=y)
        learner.set_params(class_weight=dict(zip(known["classes"], weights, strict=True)))
    for _ in range(min(MOST_PASSES, -(-STEPS // len(y)))):
        for rows, some in X:
            told = _through(steps, some)
            learner.partial_fit(np.hstack([told, np.ones((len(told), 1), told.dtype)]), y[rows], **known)
    model.coef_ = np.ascontiguousarray(learner.coef_[..., :-1])
    model.intercept_ = np.atleast_1d(learner.coef_[..., -1])
    model.t_, model.n_iter_, model.n_features_in_ = learner.t_, learner.n_iter_, learner.n_features_in_ - 1
    if known:
        model.classes_ = learner.classes_
    return head


def _through(steps: list[tuple[str, Any]], X: NDArray[np.float32]) -> NDArray[np.float32]:
    for _, step in steps:
        X = step.transform(X)
    return X


def _started(estimator: Any, y: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
    """The innermost estimator, and the quantities as it is to see them; what is around it is fitted."""
    while isinstance(estimator, TransformedTargetRegressor):
        estimator._fit_transformer(y[:, None])
        estimator._training_dim = 1
        estimator.regressor_ = clone(estimator.regressor)
        y = estimator.transformer_.transform(y[:, None])[:, 0]
        estimator = estimator.regressor_
    return estimator, y
