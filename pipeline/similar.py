"""Nearest neighbours: the images of a store whose embeddings point the same way as those of others."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from duckdb import ColumnExpression as Column
from duckdb import ConstantExpression as Constant
from numpy.typing import NDArray

from features import locations, parts, tabular
from features.embedding import Progress
from features.errors import DataError, redacted
from features.export import require_file, whole_table
from features.fill import fill_as
from features.sources import Source
from features.store import FeatureStore
from features.views import View
from pipeline import sql

SHOWN = ["source", "id", "uri"]
SCHEMA = pa.schema(
    [
        ("query", pa.string()),  # the image or the id asked for
        ("rank", pa.int64()),  # of the image found, from 1; its samples share it
        *((name, pa.string()) for name in SHOWN),
        ("similarity", pa.float32()),  # cosine of the angle between the embeddings, -1 to 1
    ]
)


@dataclass(frozen=True)
class Queries:
    """What neighbours are wanted of.

    Attributes
    ----------
    names : list of str
    embeddings : numpy.ndarray
        float32, shape (queries, dim).
    without : tuple of str, optional
        Source and id of a sample that is no neighbour of its own.
    """

    names: list[str]
    embeddings: NDArray[np.float32]
    without: tuple[str, str] | None = None


def of_images(store: FeatureStore, view: View, images: list[str], weights: str | None = None) -> Queries:
    """Embed images as a view does; the store stays as it is.

    Parameters
    ----------
    store : FeatureStore
    view : View
    images : list of str
        Paths or fsspec URLs.
    weights : str, optional
        Where the weight file is now.

    Raises
    ------
    DataError
        If an image cannot be read.
    ViewMismatch
        If the weights are not those of the view.
    """
    names = sorted(set(images))
    paths = [locations.local_path(name) for name in names]
    uris = [
        name if path is None else locations.as_uri(str(Path(path).expanduser().absolute()))
        for name, path in zip(names, paths, strict=True)
    ]
    listing = pa.table({"id": names, "uri": uris, "version": pa.nulls(len(names), pa.string())})
    with tempfile.TemporaryDirectory(prefix="permafrost-") as scratch:
        passing = FeatureStore.open_or_new(scratch)
        filled = fill_as(view, Source("images", listing, "", True), passing, weights=weights)
        for row in filled.rows.to_pylist():
            if row["status"] != "ok":
                raise DataError(f"image {redacted(row['id'])} cannot be used, {row['error']}")
        _, embeddings = parts.gather(passing.root, filled.views[0], filled.rows["sha256"])
    place = {name: row for row, name in enumerate(filled.rows["id"].to_pylist())}
    asked = list(dict.fromkeys(images))
    return Queries([redacted(name) for name in asked], embeddings[[place[name] for name in asked]])


def of_sample(store: FeatureStore, view: View, key: str, source: str | None = None) -> Queries:
    """The embedding that a view has of a listed sample.

    Raises
    ------
    DataError
        If there is no such sample, more than one, or the view has no embedding of it.
    """
    chosen = ds.field("id") == key
    if source is not None:
        chosen &= ds.field("source") == source
    found = tabular.listing(store).to_table(columns=["source", "sha256", "status"], filter=chosen).to_pylist()
    where = f"id {key!r}" + (f" of source {source!r}" if source is not None else "")
    if not found:
        raise DataError(f"no sample has {where}; `permafrost sql` tells which there are")
    if len(found) > 1:
        raise DataError(f"{where} is in several sources, say --source {' or '.join(row['source'] for row in found)}")
    [row] = found
    keys = pa.chunked_array([pa.array([row["sha256"] if row["status"] == "ok" else None], pa.string())])
    there, embeddings = parts.gather(store.root, view, keys)
    if not there.all():
        raise DataError(f"view {view.name!r} has no embedding of {where}; run `permafrost extract` again")
    return Queries([key], embeddings, (row["source"], key))


def nearest(
    store: FeatureStore,
    view: View,
    queries: Queries,
    *,
    count: int = 10,
    where: str | None = None,
    progress: Progress = lambda done, total, busy: None,
) -> pa.Table:
    """Find the nearest images by cosine similarity; exact, each of them looked at once.

    Memory holds the keys of the listing and of the view, and one row group.

    Parameters
    ----------
    store : FeatureStore
    view : View
    queries : Queries
    count : int
        How many images; of several that are equally near, the first of the listing.
    where : str, optional
        SQL condition for the samples to look at.
    progress : callable, optional

    Returns
    -------
    pyarrow.Table
        By `SCHEMA`: for each query, a row for each sample of the nearest images, by rank, source and id. What is all
        zeros is as similar as what is at a right angle.

    Raises
    ------
    DataError
        If the condition cannot be answered, or nothing is listed at all.
    """
    number = store.newest()
    if not number:
        raise DataError(f"store {store.root.path} lists no image; `permafrost extract` does")
    wanted, done = _listed(store, number, ["sha256"], queries.without, where)["sha256"], 0
    best = [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries.names]
    units, total = _units(queries.embeddings), len(wanted)
    for places, vectors in parts.scan(store.root, view, wanted):
        progress(done, total, "")
        done += len(places)
        for query, similarity in enumerate(units @ _units(vectors).T):
            best[query] = _merged(*best[query], similarity, places, count)
    winners = wanted.take(pa.array(np.unique(np.concatenate([place for _, place in best]))))
    rows = _listed(store, number, [*SHOWN, "sha256"], queries.without, where, winners.to_pylist())
    found = []
    for name, (similarity, place) in zip(queries.names, best, strict=True):
        ranked = pa.table(
            {
                "query": pa.repeat(name, len(place)),
                "rank": np.arange(1, len(place) + 1),
                "sha256": wanted.take(pa.array(place)),
                "similarity": similarity,
            }
        )
        found.append(ranked.join(rows, "sha256", join_type="inner").select(SCHEMA.names).cast(SCHEMA))
        found[-1] = found[-1].sort_by([(column, "ascending") for column in ("rank", "source", "id")])
    return pa.concat_tables(found)


def write(found: pa.Table, out: Path) -> None:
    """Write neighbours to a Parquet file, whole or not at all."""
    with whole_table(out, SCHEMA, "parquet", SCHEMA.names) as add:
        add(found)


def require_parquet(out: Path) -> None:
    """Check, before the work, that neighbours may be written there.

    Raises
    ------
    DataError
        If it is no Parquet file's name, or its folder is not there.
    """
    require_file(out)
    if out.suffix != ".parquet":
        raise DataError(f"neighbours are written as Parquet; name --out {out.with_suffix('.parquet')}")


def _listed(
    store: FeatureStore,
    number: int,
    columns: list[str],
    without: tuple[str, str] | None,
    where: str | None,
    keys: list[str] | None = None,
) -> pa.Table:
    """Some columns of the samples to look at, in the order of the listing; with `keys`, only of those images."""
    with sql.opened(store, "", number) as connection:
        listed = connection.table(sql.SAMPLES)
        if where is not None:
            listed = listed.filter(where)
        listed = listed.filter("status = 'ok'")
        if without:
            others = [Column(name) != Constant(value) for name, value in zip(("source", "id"), without, strict=True)]
            listed = listed.filter(others[0] | others[1])
        if keys is not None:
            listed = listed.filter(Column("sha256").isin(*map(Constant, keys)) if keys else Constant(False))
        return listed.select(*columns).to_arrow_table()


def _units(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of length 1; what is all zeros stays so."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)


def _merged(
    similarity: NDArray[np.float32],
    place: NDArray[np.int64],
    more: NDArray[np.float32],
    places: NDArray[np.int64],
    count: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best of what was best before and of a block, best first."""
    near = slice(None) if len(place) < count else more >= similarity[-1]
    similarity, place = np.append(similarity, more[near]), np.append(place, places[near])
    order = np.lexsort((place, -similarity))[:count]
    return similarity[order], place[order]
