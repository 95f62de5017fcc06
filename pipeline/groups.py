"""What must not be separated: copies of an image, near duplicates, or whatever shares a value of a column."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.duplicates import Pairs, near_duplicates

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Groups of samples, and how they came about.

    Attributes
    ----------
    of : numpy.ndarray
        int64, shape (samples,): equal for samples that must share a fold.
    alike : numpy.ndarray
        int64, shape (samples,): equal for copies and near duplicates.
    copies : int
        Samples whose very bytes an earlier one has.
    near : int
        Samples beyond these that are in a group with another image.
    pairs : Pairs
        Of samples whose images are copies, by the first view, but not byte for byte.
    """

    of: Rows
    alike: Rows
    copies: int
    near: int
    pairs: Pairs


def find(samples: pd.DataFrame, embeddings: list[NDArray[np.float32]], column: str | None, near: bool) -> Groups:
    """Group samples by their bytes, and by a column, or else, if `near`, by each view's embeddings.

    Parameters
    ----------
    samples : pandas.DataFrame
    embeddings : list of numpy.ndarray
        float32, each of shape (samples, dim).
    column : str, optional
        A missing value groups with nothing.
    near : bool
    """
    same = pd.factorize(samples["sha256"])[0].astype(np.int64)
    # Copies have one embedding, and are compared once.
    first = np.unique(same, return_index=True)[1]
    found = [near_duplicates(matrix[first]) for matrix in embeddings] if near else []
    alike = united([same, *(groups[same] for groups, _ in found)])
    pairs = found[0][1] if found else Pairs.none()
    pairs = replace(pairs, first=first[pairs.first], second=first[pairs.second])
    of = alike
    if column is not None:
        values = pd.factorize(samples[column])[0].astype(np.int64)
        alone = values < 0
        values[alone] = values.max(initial=-1) + 1 + np.arange(alone.sum())
        # Who names what belongs together knows better than a resemblance.
        of = united([same, values])
    sizes = np.bincount(alike[first])
    return Groups(of, alike, len(same) - len(first), int(sizes[sizes > 1].sum()), pairs)


def united(groupings: list[Rows]) -> Rows:
    """Rows that any of the groupings holds together, or that a chain of them does, become one group."""
    rows = np.arange(len(groupings[0]))
    edges = []
    for grouping in groupings:
        first = pd.Series(rows).groupby(grouping).transform("first").to_numpy()
        edges.append(np.stack([rows, first]))
    here, there = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(here), bool), (here, there)), shape=(len(rows), len(rows)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
