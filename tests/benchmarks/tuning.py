"""Nested tuning of an rbf_svm on 4,000 x 512, ours beside scikit-learn's own, side by side in one run.

Run as ``python tests/benchmarks/tuning.py``. Both search ten settings in 5 x 3 folds; ours normalises embeddings, and
computes the distances between them once, where the other scales and computes kernels in every fit.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pipeline.evaluate import held_out
from pipeline.folds import Examples, fold
from pipeline.heads import GRIDS
from pipeline.tuning import Recipe

ROWS, DIM, CLASSES, ROUNDS = 4000, 512, 10, 3


def embeddings() -> Examples:
    """Not negative, of a few strong directions, and classes that overlap, as a backbone's are."""
    random = np.random.default_rng(0)
    y = np.arange(ROWS) % CLASSES
    strength = 1 / np.sqrt(np.arange(1, DIM + 1))
    hidden = random.normal(size=(ROWS, DIM)) * strength + 0.2 * random.normal(size=(CLASSES, DIM))[y] * strength
    X = np.maximum(hidden @ random.normal(size=(DIM, DIM)) / 4, 0).astype(np.float32)
    return Examples(X, y, "multiclass", np.arange(ROWS))


def main() -> None:
    """Print seconds, scores and ratios."""
    data = embeddings()
    grid = {"svc__C": GRIDS["rbf_svm"]["C"], "svc__gamma": [width / (2 * DIM) for width in GRIDS["rbf_svm"]["width"]]}
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        ours = held_out(Recipe("multiclass", "rbf_svm", tune=True), data, fold(data, 5)).scores()["accuracy"].value
        mine = time.perf_counter() - begun
        begun = time.perf_counter()
        search = GridSearchCV(make_pipeline(StandardScaler(), SVC()), grid, cv=3)
        outer = StratifiedKFold(5, shuffle=True, random_state=0)
        found = cross_validate(search, data.X, data.y, cv=outer, n_jobs=-1)
        theirs = time.perf_counter() - begun
        print(
            f"ours {mine:.1f} s, accuracy {ours:.4f}; scikit-learn {theirs:.1f} s, accuracy "
            f"{found['test_score'].mean():.4f}; {theirs / mine:.1f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
