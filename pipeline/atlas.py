"""A map of embeddings: where images lie on a plane on which neighbours in the embedding are neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from pipeline.folds import SEED

MOST = 1000
"""Images on a map: more are drawn over each other, and their pictures would weigh down the page."""
COMPONENTS = 30
PERPLEXITY = 20
STEPS = 500
FEWEST = 10
"""Images below which two principal components do."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Atlas:
    """Which images are on the map, and where.

    Attributes
    ----------
    rows : numpy.ndarray
        int64, shape (shown,): places in the data set, in ascending order.
    places : numpy.ndarray
        float64, shape (shown, 2), from 0 to 1.
    """

    rows: NDArray[np.int64]
    places: Floats


def drawn(X: NDArray[np.float32], among: NDArray[np.int64]) -> Atlas:
    """Lay out at most `MOST` embeddings by t-SNE (van der Maaten and Hinton 2008) of their principal components.

    Parameters
    ----------
    X : numpy.ndarray
        float32, shape (samples, dim).
    among : numpy.ndarray
        int64: places of the samples that may be shown.
    """
    rows = np.sort(np.random.default_rng(SEED).permutation(among)[:MOST])
    some = X[rows].astype(np.float64)
    some = (some - some.mean(axis=0)) / (some.std(axis=0) + 1e-6)
    places = np.zeros((len(rows), 2))
    # Equal embeddings have no axes, and the trees within t-SNE crash on what is no number.
    if some.any():
        # Threads of OpenMP wait by spinning, and beside other work take thirty times as long.
        with threadpool_limits(limits=1):
            main = PCA(min(COMPONENTS, *some.shape), random_state=SEED).fit_transform(some)
            places[:, : min(2, main.shape[1])] = main[:, :2]
            if len(rows) >= FEWEST:
                method = TSNE(
                    perplexity=min(PERPLEXITY, (len(rows) - 1) / 3),
                    init=(places / places[:, 0].std() * 1e-4).astype(np.float32),
                    max_iter=STEPS,
                    random_state=SEED,
                    n_jobs=1,
                )
                places = method.fit_transform(main).astype(np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    return Atlas(rows, (places - low) / np.maximum(high - low, 1e-9))
