"""Whether new embeddings are like those that a head was trained on: each by itself, and a batch as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics.pairwise import euclidean_distances

Matrix = NDArray[np.float32]
Floats = NDArray[np.float64]

MOST = 500
"""Embeddings that stand for the training set, and for a batch."""
NEIGHBOUR = 5
PERMUTATIONS = 400
SEED = 0
BLOCK = 4096


def reference(X: Matrix, groups: NDArray[np.int64]) -> Matrix:
    """At most `MOST` embeddings that stand for a training set, of different groups.

    Parameters
    ----------
    X : numpy.ndarray
        float32, shape (examples, dim).
    groups : numpy.ndarray
        int64, shape (examples,): of copies and the like one is enough.

    Returns
    -------
    numpy.ndarray
        float32, shape (at most `MOST`, dim).

    Examples
    --------
    >>> X = np.arange(8, dtype=np.float32).reshape(4, 2)
    >>> reference(X, np.array([0, 0, 1, 2])).shape
    (3, 2)
    """
    first = np.unique(groups, return_index=True)[1]
    return np.ascontiguousarray(X[np.sort(np.random.default_rng(SEED).permutation(first)[:MOST])], np.float32)


def oddity(X: Matrix, known: Matrix) -> Floats:
    """For each embedding the share of training embeddings that lie less far from the others; near 1 is odd.

    The distance is that to the fifth nearest neighbour, of embeddings scaled as the training set's (Sun et al. 2022);
    a share is a conformal p-value turned round (Bates et al. 2023).

    Parameters
    ----------
    X, known : numpy.ndarray
        float32, shape (rows, dim) and (training embeddings, dim).

    Returns
    -------
    numpy.ndarray
        float64, shape (rows,), from 0 to 1.

    Examples
    --------
    >>> known = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    >>> far = np.full((1, 4), 9, np.float32)
    >>> oddity(far, known)
    array([1.])
    >>> oddity(known.mean(axis=0, keepdims=True), known)[0] < 0.5
    np.True_
    """
    middle, spread = known.mean(axis=0), known.std(axis=0) + 1e-6
    among = (known - middle) / spread
    place = min(NEIGHBOUR, len(known) - 1)
    usual = np.sort(np.partition(euclidean_distances(among), place, axis=1)[:, place])
    found = np.empty(len(X))
    for start in range(0, len(X), BLOCK):
        far = euclidean_distances((X[start : start + BLOCK] - middle) / spread, among)
        nearest = np.partition(far, place - 1 if place else 0, axis=1)[:, place - 1 if place else 0]
        found[start : start + BLOCK] = np.searchsorted(usual, nearest) / len(usual)
    return found


def compare(batch: Matrix, known: Matrix) -> dict[str, Any] | None:
    """How well a batch can be told from the training set, and how often chance alone would do as well.

    A classifier by mean kernels says of each embedding, without itself, which set it is more like: the witness of the
    maximum mean discrepancy (Gretton et al. 2012), judged as a classifier (Lopez-Paz and Oquab 2017), with labels
    permuted for the p-value.

    Parameters
    ----------
    batch, known : numpy.ndarray
        float32, shape (rows, dim) and (training embeddings, dim).

    Returns
    -------
    dict or None
        ``auc`` (0.5: cannot be told), ``p_value``, ``rows``; None for fewer than two embeddings on either side.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> known, batch = random.normal(size=(200, 4)), random.normal(size=(50, 4))
    >>> compare(batch, known)["p_value"] > 0.05
    True
    >>> moved = compare(batch + 2, known)
    >>> moved["auc"] > 0.9, moved["p_value"] < 0.01
    (True, True)
    """
    rows = len(batch)
    if min(rows, len(known)) < 2:
        return None
    random = np.random.default_rng(SEED)
    batch = batch[np.sort(random.permutation(rows)[:MOST])]
    both = np.concatenate([batch, known]).astype(np.float64)
    # Whatever depends on which set a row is of would make the permutations unlike the truth.
    far = euclidean_distances((both - both.mean(axis=0)) / (both.std(axis=0) + 1e-6), squared=True)
    kernel = np.exp(-far / max(float(np.median(far)), 1e-12))
    np.fill_diagonal(kernel, 0)
    mine = np.zeros((len(both), PERMUTATIONS + 1), bool)
    mine[: len(batch), 0] = True
    for column in range(1, PERMUTATIONS + 1):
        mine[random.permutation(len(both))[: len(batch)], column] = True
    found = _auc(kernel, mine, len(batch))
    beyond = int((found[1:] >= found[0]).sum())
    return {"auc": float(found[0]), "p_value": (1 + beyond) / (1 + PERMUTATIONS), "rows": rows}


def _auc(kernel: Floats, mine: NDArray[np.bool_], count: int) -> Floats:
    """Of each column of labels, the area under the curve of the witness without the row itself."""
    others = len(mine) - count
    towards, total = kernel @ mine, kernel.sum(axis=1)[:, None]
    witness = towards / np.where(mine, count - 1, count) - (total - towards) / np.where(mine, others, others - 1)
    ranks = np.where(mine, rankdata(witness, axis=0), 0).sum(axis=0)
    return np.asarray((ranks - count * (count + 1) / 2) / (count * others))
