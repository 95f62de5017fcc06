"""A look at a store without labels: what kinds of images there are, which are odd, and which are there twice."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from features import reading
from features.embedding import Progress
from features.errors import DataError
from features.guards import require_folder
from features.store import FeatureStore
from pipeline import atlas, dataset, galleries, page, problems, streaming, thumbnails
from pipeline.atlas import COMPONENTS
from pipeline.duplicates import BLOCK, MOST_PAIRS, Pairs
from pipeline.folds import SEED

MOST_CLUSTERS = 30
MOST_FITTED = 10_000
"""Embeddings that clusters are found by."""
MOST_JUDGED = 1_000
REPRESENTATIVES = 7
MIRRORED = 0.985
"""Cosine of the pixels of one image and another one's mirror image: more in 99% of 420 re-encoded, resized and mirrored
photographs, in none of 9 million pairs of unlike ones."""
FILES = ("report.html", "report.json", "clusters.parquet", "outliers.parquet", "near_duplicates.parquet")

Matrix = NDArray[np.float32]


def explore(
    store: FeatureStore,
    out: Path,
    *,
    view: str | None = None,
    where: str | None = None,
    clusters: int | None = None,
    mirrored: bool = False,
    with_images: bool = True,
    progress: Progress = lambda done, total, busy: None,
) -> dict[str, Any]:
    """Cluster the images of a store, rank the odd ones, find doubles, and draw all that as a page.

    Where embeddings would not fit in memory, a random sample of `pipeline.dataset.MOST_SEEN` images stands for all, and
    no near duplicates are sought.

    Parameters
    ----------
    store : FeatureStore
    out : pathlib.Path
        Directory for `FILES`; those of an earlier look are replaced.
    view : str, optional
        Needed where the store has more than one.
    where : str, optional
        SQL condition over the samples' columns.
    clusters : int, optional
        How many; by default as many, up to `MOST_CLUSTERS`, as the silhouette prefers.
    mirrored : bool
        Whether to read every image again, and find those that are mirror images of others too.
    with_images : bool
        Whether the page shows images, which are read again for it.
    progress : callable, optional

    Returns
    -------
    dict
        The content of `report.json`.

    Raises
    ------
    DataError
        If nothing is chosen, there are fewer images than clusters, or `out` holds anything else.

    Examples
    --------
    >>> facts = explore(FeatureStore.open("store"), Path("look"), clusters=3)
    >>> facts["samples"], facts["clusters"]
    (24, [8, 8, 8])
    """
    require_free(out)
    chosen, snapshot = store.pick_view(view), store.snapshot()
    every = dataset.load(store, [chosen], snapshot, [], dataset.Selection(where), streaming.needed, out.parent)
    data = every.in_memory()
    samples, X = data.samples, np.asarray(data.embeddings[chosen.name])
    label, distance = clustered(X, clusters)
    pairs = problems.near_duplicates(samples, data.groups.pairs)
    if mirrored:
        turned = problems.pairs(samples, mirror_images(samples, progress), "mirrored")
        # To some backbones a mirror image is as good as a copy.
        pairs = pd.concat([pairs, turned]).drop_duplicates(["first", "second"], keep="last")
    odd = problems.outliers(samples, X)
    named = np.array([f"cluster {number + 1}" for number in label], dtype=object)
    drawn = atlas.drawn(X, np.arange(len(samples)))
    groups: list[list[galleries.Item]] = []
    for number in range(label.max() + 1):
        members = np.flatnonzero(label == number)
        nearest = members[np.argsort(distance[members], kind="stable")][:REPRESENTATIVES]
        groups.append([("", [int(row)]) for row in nearest])
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "store": store.root.url,
        "view": chosen.name,
        "snapshot": {"number": snapshot.number, "digest": snapshot.digest},
        "samples": len(every),
        "seen": len(samples),
        "streamed": every.streamed,
        "left_out": {name: count for name, count in data.left_out.items() if count},
        "clusters": np.bincount(label).tolist(),
        "outliers": int(odd["outlier"].sum()),
        "near_duplicates": len(pairs),
        "copies": every.groups.copies,
    }
    shown = galleries.shown([*groups, galleries.pairs_of(pairs), galleries.odd_ones(odd)], drawn)
    pictures = thumbnails.read(samples, shown, progress) if with_images else None
    html = page.of_store(facts, samples, groups, pairs, odd, drawn, named, pictures)
    table = samples[["source", "id", "uri"]].assign(cluster=label + 1, distance=distance)
    files = {
        "report.html": html.encode(),
        "report.json": (json.dumps(facts, indent=1) + "\n").encode(),
        "clusters.parquet": problems.as_parquet(table),
        "outliers.parquet": problems.as_parquet(odd),
        "near_duplicates.parquet": problems.as_parquet(pairs.drop(columns=["first", "second"])),
    }
    _write(out, files)
    return facts


def clustered(X: Matrix, count: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cluster embeddings by k-means on the directions of their principal components.

    Parameters
    ----------
    X : numpy.ndarray
        float32, shape (samples, dim).
    count : int, optional
        By default the one with the largest silhouette (Rousseeuw 1987).

    Returns
    -------
    label : numpy.ndarray
        int64, shape (samples,): from 0, the largest cluster first.
    distance : numpy.ndarray
        float64, shape (samples,): to the centre.

    Raises
    ------
    DataError
        If there are fewer samples than `count`.

    Examples
    --------
    >>> X = np.repeat(np.eye(2, dtype=np.float32), [3, 2], axis=0)
    >>> label, distance = clustered(X, 2)
    >>> label.tolist()
    [0, 0, 0, 1, 1]
    """
    if count is not None and count > len(X):
        raise DataError(f"{len(X)} images cannot make {count} clusters; use fewer --clusters")
    some = np.random.default_rng(SEED).permutation(len(X))[:MOST_FITTED]
    scaled = (X - X[some].mean(axis=0)) / (X[some].std(axis=0) + 1e-6)
    with threadpool_limits(limits=1):
        main = scaled
        if min(scaled[some].shape) > COMPONENTS:
            main = PCA(COMPONENTS, random_state=SEED).fit(scaled[some]).transform(scaled)
        main = main / np.maximum(np.linalg.norm(main, axis=1, keepdims=True), 1e-9)
        distinct = len(np.unique(main[some], axis=0))
        counts = [count] if count else range(2, min(MOST_CLUSTERS, distinct - 1) + 1)
        models = [KMeans(min(k, distinct), n_init=3, random_state=SEED).fit(main[some]) for k in counts]
        judged = [_silhouette(main[some], model.labels_) for model in models]
        model = models[int(np.argmax(judged))] if models else KMeans(1, random_state=SEED).fit(main[some])
        found, distance = model.predict(main), model.transform(main).min(axis=1)
    sizes = np.bincount(found, minlength=model.n_clusters)
    place = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return place[found].astype(np.int64), np.asarray(distance, float)


def mirror_images(samples: pd.DataFrame, progress: Progress = lambda done, total, busy: None) -> Pairs:
    """Find the pairs of which one is the mirror image of the other, whatever its size and encoding, by their pixels.

    Parameters
    ----------
    samples : pandas.DataFrame
        Copies byte for byte are looked at once.

    Returns
    -------
    Pairs
        Places among the samples, the most similar first.
    """
    rows = np.flatnonzero(~samples["sha256"].duplicated().to_numpy())
    once = samples.iloc[rows]
    pixels = np.zeros((len(once), 16, 16, 3), np.float32)
    told = reading.read_all(once["uri"].tolist(), lambda key: {"tiny": (thumbnails.tiny_pixels, True)})
    for row, each in enumerate(told):
        if "tiny" in each.pixels and each.facts["sha256"] == once["sha256"].iloc[row]:
            pixels[row] = each.pixels["tiny"]
        progress(row + 1, len(once), "")
    plain, turned = pixels.reshape(len(once), -1), pixels[:, :, ::-1].reshape(len(once), -1)
    found: list[tuple[Any, ...]] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for start in range(0, len(plain), BLOCK):
        cosine = plain[start : start + BLOCK] @ turned.T
        first, second = np.nonzero(cosine > MIRRORED)
        # An image that is its own mirror image resembles its copies either way.
        kept = (first + start < second) & (
            np.einsum("ij,ij->i", plain[first + start], plain[second]) < cosine[first, second]
        )
        first, second = first[kept], second[kept]
        found.append((first + start, second, cosine[first, second]))
    first, second, similarity = (np.concatenate([each[part] for each in found]) for part in range(3))
    order = np.argsort(-similarity, kind="stable")[:MOST_PAIRS]
    return Pairs(rows[first[order]], rows[second[order]], similarity[order])


def require_free(out: Path) -> None:
    """Check, before the work, that a page and its tables may be written there.

    Raises
    ------
    DataError
        If something else is there.
    """
    require_folder(out.parent)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a directory with --out")
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.exists() else []
    if others:
        raise DataError(f"{out} holds {others[0]}, which no earlier look has left there; use another --out")


def _silhouette(main: NDArray[Any], label: NDArray[Any]) -> float:
    some = slice(0, MOST_JUDGED)
    if not 1 < len(np.unique(label[some])) < len(label[some]):
        return -1.0
    return float(silhouette_score(main[some], label[some]))


def _write(out: Path, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        for name, content in files.items():
            Path(scratch, name).write_bytes(content)
        out.mkdir(exist_ok=True)
        for name in files:
            Path(scratch, name).replace(out / name)
