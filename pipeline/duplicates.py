"""Near duplicates, by the embeddings of one view: copies of one image, and frames of one object.

Embeddings are centred and divided by their spread along each principal axis, as far as it rises above a ridge: what
a whole data set has in common then counts no more than what tells two images apart. A cosine between two such rows
is judged by how far it lies outside all pairs of the set, Fisher's z (Biometrika 10, 1915) over the median absolute
deviation. Copies are the pairs beyond a high limit, wherever they stand. Frames of a sequence stand side by side in
a listing, as their names number them: there a lower limit does, where most neighbours around are as close.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

COPY = 18.0
"""Deviations of a copy: of 1,200 re-encoded or resized photographs 99% have more, of unlike ones under 1% do."""

FRAME = 6.0
"""Deviations of a frame to the next: more in 91 to 98% of those of road signs, in 0 to 10% of photographs that stand
side by side because they are of one class."""
NEXT = 3
"""Places further on in the listing at which a frame's next one is looked for, should one between them be odd."""
AROUND = 4
LINKS = 2.5
"""How many of the 2 x `NEXT` rows beside it a row has to resemble, on average over `AROUND` rows on either side."""
SAME = 0.5
"""Share of a sequence's frames that must have a copy in another one for the two to be one."""

RIDGE = 1.0
"""Of the mean variance of an axis."""
BLOCK = 2048
MOST_EDGES = 4_000_000
MOST_PAIRS = 10_000
"""That are listed."""

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]
Edges = tuple[Rows, Rows, Matrix]


@dataclass(frozen=True)
class Pairs:
    """Rows that are copies of each other.

    Attributes
    ----------
    first, second : numpy.ndarray
        int64, shape (pairs,): numbers of rows, the lower one first.
    similarity : numpy.ndarray
        float32, shape (pairs,): cosine of the whitened embeddings, at most 1.
    """

    first: Rows
    second: Rows
    similarity: Matrix

    @classmethod
    def none(cls) -> Pairs:
        """Not one."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def near_duplicates(X: Matrix) -> tuple[Rows, Pairs]:
    """Group the rows that must share a fold, and list the pairs of copies.

    Parameters
    ----------
    X : numpy.ndarray
        float32, shape (samples, dim): finite embeddings of one view, in the order of the listing.

    Returns
    -------
    groups : numpy.ndarray
        int64, shape (samples,): equal numbers for the rows of one group, counted from 0 by first appearance.
    pairs : Pairs
        The most similar first, `MOST_PAIRS` at most.

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(60, 30)).astype(np.float32)
    >>> X[7] = X[3]
    >>> groups, pairs = near_duplicates(X)
    >>> int(groups[7] == groups[3]), list(zip(pairs.first.tolist(), pairs.second.tolist()))
    (1, [(3, 7)])
    """
    if len(X) < 2:
        return np.zeros(len(X), np.int64), Pairs.none()
    rows = _unit(*_whiten(X))
    spread = _spread(rows)
    kept: list[Pairs] = []
    groups = _connected(len(rows), _keeping(_close(rows, _limit(spread)), kept), *_frames(rows, spread))
    return groups, _most_similar(kept)


def _keeping(found: Iterator[Edges], kept: list[Pairs]) -> Iterator[Edges]:
    """Hand on, and keep what is most similar."""
    for edges in found:
        kept.append(Pairs(*edges))
        if sum(len(pairs.first) for pairs in kept) > 4 * MOST_PAIRS:
            kept[:] = [_most_similar(kept)]
        yield edges


def _most_similar(kept: list[Pairs]) -> Pairs:
    every = [Pairs.none(), *kept]
    first, second = (np.concatenate([getattr(pairs, side) for pairs in every]) for side in ("first", "second"))
    similarity = np.concatenate([pairs.similarity for pairs in every])
    order = np.lexsort((second, first, -similarity))[:MOST_PAIRS]
    return Pairs(first[order], second[order], similarity[order])


def _whiten(X: Matrix) -> tuple[Matrix, NDArray[np.float64]]:
    """Coordinates on the principal axes, float32 of shape (samples, axes), and the axes' variances.

    Rows that equal the mean have no direction: their coordinates are zero.
    """
    samples, dim = X.shape
    centred = X / np.float32(max(X.max(initial=0), -X.min(initial=0)) or 1)
    centred -= (centred.sum(0, dtype=np.float64) / max(samples, 1)).astype(np.float32)
    centred[np.einsum("ij,ij->i", centred, centred) <= 1e-12 * dim] = 0
    blocks = [centred[start : start + BLOCK] for start in range(0, samples, BLOCK)]
    if samples <= dim:
        variances, left = np.linalg.eigh(centred.astype(np.float64) @ centred.T.astype(np.float64))
        kept = variances > 1e-9 * variances.max(initial=0)
        axes = centred.T @ (left[:, kept] / np.sqrt(variances[kept]))
    else:
        variances, axes = np.linalg.eigh(sum((b.T.astype(np.float64) @ b.astype(np.float64) for b in blocks), 0.0))
        kept = variances > 1e-9 * variances.max(initial=0)
        axes = axes[:, kept]
    axes = axes.astype(np.float32)
    for block in blocks:
        block[:, : axes.shape[1]] = block @ axes
    return centred[:, : axes.shape[1]], variances[kept]


def _unit(coordinates: Matrix, variances: NDArray[np.float64]) -> Matrix:
    """Rows of length one, with each axis divided by its spread; rows at the mean get an axis of their own."""
    rows = np.empty((len(coordinates), len(variances) + 1), np.float32)
    np.divide(coordinates, np.sqrt(variances + RIDGE * variances.mean() if len(variances) else 1), out=rows[:, :-1])
    rows[:, -1] = ~rows[:, :-1].any(1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _spread(rows: Matrix) -> float:
    """Deviation of the cosines of all pairs; of a sample of them from 2,048 rows on."""
    if len(rows) < 5:
        return 1.0
    # The order of the rows must not matter, so those to look at are spread along the axis of the largest variance.
    taken = np.argsort(rows[:, -min(2, rows.shape[1])], kind="stable")[:: -(-len(rows) // BLOCK)]
    cosines = rows[taken] @ rows[taken].T
    np.fill_diagonal(cosines, np.nan)
    return max(1.4826 * float(np.nanmedian(np.abs(cosines))), 1e-3)


def _frames(rows: Matrix, spread: float) -> tuple[tuple[Rows, Rows], Matrix]:
    """Pairs of rows in sequences, and each row's largest cosine with one that stands beside it."""
    found, nearest = [np.empty((2, 0), np.int64)], np.full(len(rows), -1, np.float32)
    for lag in range(1, min(NEXT, len(rows) - 1) + 1):
        cosine = np.einsum("ij,ij->i", rows[:-lag], rows[lag:])
        nearest[:-lag], nearest[lag:] = np.maximum(nearest[:-lag], cosine), np.maximum(nearest[lag:], cosine)
        close = np.flatnonzero(cosine > np.tanh(FRAME * spread))
        found.append(np.stack([close, close + lag]))
    first, second = np.concatenate(found, axis=1)
    links = np.bincount(np.concatenate([first, second]), minlength=len(rows))
    window = np.ones(2 * AROUND + 1) / (2 * AROUND + 1)
    dense = np.convolve(np.pad(links, AROUND, mode="edge"), window, mode="valid") >= LINKS
    kept = dense[first] & dense[second]
    return (first[kept], second[kept]), nearest


def _limit(spread: float) -> float:
    # Unlike images of a small set reach no 0.9999; of a large one, with hundreds of axes, none reaches 0.4 by chance.
    return float(np.clip(np.tanh(COPY * spread), 0.4, 0.9999))


def _close(rows: Matrix, limit: float) -> Iterator[Edges]:
    for start in range(0, len(rows), BLOCK):
        for other in range(start, len(rows), BLOCK):
            cosines = rows[start : start + BLOCK] @ rows[other : other + BLOCK].T
            first, second = np.nonzero(cosines > limit)
            kept = first + start < second + other
            first, second = first[kept], second[kept]
            yield first + start, second + other, np.minimum(cosines[first, second], 1)


def _connected(samples: int, found: Iterator[Edges], frames: tuple[Rows, Rows], nearest: Matrix) -> Rows:
    sequences = _merged(np.arange(samples), [frames])
    sizes = np.bincount(sequences)
    groups, waiting = sequences, list[tuple[Rows, Rows]]()
    met = np.empty(0, np.int64)
    # Pairs of a set with many copies outnumber its rows by far; what they connect does not.
    for first, second, cosine in found:
        here, there = sequences[first], sequences[second]
        long = (np.minimum(sizes[here], sizes[there]) * SAME > 1) & (here != there)
        closer = long & (cosine > np.maximum(nearest[first], nearest[second]))
        keys = [first[closer] * samples + there[closer], second[closer] * samples + here[closer]]
        met = np.unique(np.concatenate([met, *keys]))
        waiting.append((first[~long], second[~long]))
        if sum(len(part) for part, _ in waiting) > MOST_EDGES:
            groups, waiting = _merged(groups, waiting), []
    # Dark frames of two objects may pass for copies, and are two sequences all the same. In a copy of a sequence most
    # frames are closer to those of the original than to the next.
    row, there = np.divmod(met, samples)
    keys, counts = np.unique(sequences[row] * samples + there, return_counts=True)
    here, there = np.divmod(keys, samples)
    same = counts >= SAME * sizes[here]
    starts = np.unique(sequences, return_index=True)[1]
    return _merged(groups, [*waiting, (starts[here[same]], starts[there[same]])])


def _merged(groups: Rows, edges: list[tuple[Rows, Rows]]) -> Rows:
    first, second = (np.concatenate([groups[:0], *(groups[edge[i]] for edge in edges)]) for i in (0, 1))
    size = len(groups)
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(size, size))
    return _numbered(connected_components(graph, directed=False)[1][groups])


def _numbered(groups: Rows) -> Rows:
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)
