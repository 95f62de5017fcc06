"""A bundle and new images become a Parquet file of predictions, one row for every sample.

The samples are read in the order of the store's parts and told of in their own. Between the two, a scratch file holds
what the heads said, so that memory holds the listing and a block, and never rows times classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import locations, parts, samples
from features.embedding import Progress
from features.errors import DataError, Drifted
from features.export import require_file
from features.fill import fill_as
from features.guards import require_samples
from features.sources import Source
from features.store import FeatureStore, Snapshot
from features.views import View
from pipeline import dataset, drift, records
from pipeline.audit import blamed_on_the_bundle
from pipeline.bundle import Bundle

SIGNIFICANT = 0.05
ODD = 0.99
"""Share of the training embeddings that lie less far from the others than an odd one does."""
BLOCK_BYTES = 2**25
MOST_ROWS = 2**16
"""A block of records, which is a row group of the predictions, has at most so many bytes and rows."""
CARRIED = ["source", "id", "uri", "sha256", "status", "error"]

Watch = Callable[[str], AbstractContextManager[Progress]]
"""Called with what is about to be done; yields what is told of the samples done."""


def unwatched(what: str) -> AbstractContextManager[Progress]:
    """A `Watch` that shows nothing."""
    return nullcontext(lambda done, total, busy: None)


def predict_store(bundle: Bundle, store: FeatureStore, out: Path, *, watch: Watch = unwatched) -> dict[str, Any]:
    """Predict every sample that a store lists, from the embeddings it has.

    Parameters
    ----------
    bundle : Bundle
    store : FeatureStore
    out : pathlib.Path
        Parquet, written whole or not at all: one row per sample, by source and id, with ``source, id, uri, sha256,
        status, error``, the columns of `pipeline.records.columns`, and where a sample has no prediction the reason.
    watch : callable, optional

    Returns
    -------
    dict
        How many ``samples`` there are, ``predicted`` and ``failed``, how many are ``odd``, and the ``drift``: see
        `pipeline.drift.compare`; None for bundles without reference embeddings, and for fewer than two images.

    Raises
    ------
    ViewMismatch
        If the store has no view of the bundle's fingerprint.

    Examples
    --------
    >>> from pipeline import bundle
    >>> found = predict_store(bundle.load(Path("bundle")), FeatureStore.open("store"), Path("predictions.parquet"))
    >>> found["samples"], found["predicted"], found["failed"]
    (24, 24, 0)
    >>> pq.read_table("predictions.parquet", columns=["id", "prediction"]).to_pylist()[0]
    {'id': 'test/blue/20.png', 'prediction': 'blue'}
    """
    view = dataset.matching_view(store, bundle.view)
    return _predict(bundle, store, view, store.snapshot().samples.select(CARRIED), out, watch)


def predict_source(
    bundle: Bundle,
    source: Source,
    out: Path,
    *,
    store: FeatureStore | None = None,
    weights: str | None = None,
    device: str = "auto",
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Embed what a source has with the bundle's own view, and predict it.

    Parameters
    ----------
    bundle : Bundle
    source : Source
    out : pathlib.Path
        See `predict_store`.
    store : FeatureStore, optional
        Embeddings in it are not computed again, and new ones are added to it; its listing stays as it is.
    weights : str, optional
        Where the weight file is now.
    device : str
    watch : callable, optional

    Returns
    -------
    dict
        See `predict_store`.

    Raises
    ------
    ViewMismatch
        If the weights, or the store's view of that name, are not those of the bundle.

    Examples
    --------
    >>> from features.sources import list_source
    >>> from pipeline import bundle
    >>> trained = bundle.load(Path("bundle"))
    >>> found = predict_source(trained, list_source("photos/test"), Path("predictions.parquet"))
    >>> found["samples"], found["predicted"]
    (6, 6)
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="permafrost-") as scratch:
            passing = FeatureStore.open_or_new(scratch)
            return predict_source(bundle, source, out, store=passing, weights=weights, device=device, watch=watch)
    require_samples(source, Snapshot(0, "", samples.empty(), {}))
    with watch("embedding") as progress:
        filled = fill_as(bundle.view, source, store, weights=weights, device=device, progress=progress)
    return _predict(bundle, store, filled.views[0], filled.rows.select(CARRIED), out, watch)


def require_writable(out: Path, source: str | None = None) -> None:
    """Check, before the work, that predictions of a source may be written there.

    Raises
    ------
    DataError
        If it is no Parquet file's name, its folder is not there, or it is the source itself.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise DataError(f"predictions are written as Parquet; name --out {out.with_suffix('.parquet')}")
    place = Path((source and locations.local_path(source)) or "")
    if out.is_file() and place.is_file() and out.samefile(place):
        raise DataError(f"--out {out} is the source itself, which would be lost; name another file")
    require_file(out)


def in_words(found: dict[str, Any]) -> str:
    """What a comparison with the training set means.

    Parameters
    ----------
    found : dict
        See `pipeline.drift.compare`.

    Returns
    -------
    str

    Examples
    --------
    >>> in_words({"auc": 0.52, "p_value": 0.4, "rows": 50})
    'as a whole they cannot be told from the training set (p 0.400)'
    """
    if found["p_value"] >= SIGNIFICANT:
        return f"as a whole they cannot be told from the training set (p {found['p_value']:.3f})"
    told = f"AUC {found['auc']:.3f}, p {found['p_value']:.3f}"
    return f"as a whole they can be told from the training set ({told}): do not trust the scores of the bundle for them"


def require_alike(found: dict[str, Any] | None, max_drift: float) -> None:
    """Check that a batch cannot be told from the training set better than by some AUC, chance aside.

    Parameters
    ----------
    found : dict or None
        See `pipeline.drift.compare`.
    max_drift : float
        An AUC, from 0.5 to 1.

    Raises
    ------
    DataError
        If the bundle has no reference embeddings.
    Drifted
        If it can.

    Examples
    --------
    >>> require_alike({"auc": 0.6, "p_value": 0.01, "rows": 50}, max_drift=0.7)
    >>> require_alike({"auc": 0.9, "p_value": 0.01, "rows": 50}, max_drift=0.7)
    Traceback (most recent call last):
    features.errors.Drifted: the images can be told from the training set with AUC 0.900, ...
    """
    if found is None:
        raise DataError("--max-drift needs a bundle with reference embeddings, and two images; train it again")
    if found["auc"] > max_drift and found["p_value"] < SIGNIFICANT:
        raise Drifted(
            f"the images can be told from the training set with AUC {found['auc']:.3f}, more than --max-drift "
            f"{max_drift:g}; look at the odd ones, and label some of them"
        )


def _predict(
    bundle: Bundle, store: FeatureStore, view: View, rows: pa.Table, out: Path, watch: Watch
) -> dict[str, Any]:
    rows = rows.sort_by([("source", "ascending"), ("id", "ascending")])
    # Without a name, so that it is gone however this process ends.
    with tempfile.TemporaryFile(dir=out.parent) as scratch, watch("predicting") as progress:
        batch = _say(bundle, store, view, samples.readable(rows), scratch, progress)
        found = _write(bundle, view, rows, scratch, out)
        with blamed_on_the_bundle():
            compared = drift.compare(batch, bundle.reference) if bundle.reference is not None else None
    return found | {"drift": compared}


def _say(
    bundle: Bundle, store: FeatureStore, view: View, wanted: pa.ChunkedArray, scratch: BinaryIO, progress: Progress
) -> NDArray[np.float32]:
    """Put a record of each image into its place of the scratch file; returns embeddings that stand for all of them."""
    layout = records.layout(bundle)
    block, size, done, total = _block(layout), layout.itemsize, 0, len(wanted) - wanted.null_count
    scratch.truncate(len(wanted) * size)
    drawn = _drawn(wanted)
    batch, have = np.empty((len(drawn), view.dim), np.float32), np.zeros(len(drawn), bool)
    for places, vectors in parts.join(store.root, view, wanted):
        _, mine, theirs = np.intersect1d(drawn, places, assume_unique=True, return_indices=True)
        batch[mine], have[mine] = vectors[theirs], True
        for start in range(0, len(places), block):
            some = slice(start, start + block)
            content, here = memoryview(records.said(bundle, vectors[some]).tobytes()), places[some]
            # Rows that follow one another are written at once.
            begins = np.flatnonzero(np.diff(here, prepend=-2) != 1)
            for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(here)], strict=True):
                scratch.seek(int(here[begin]) * size)
                scratch.write(content[begin * size : end * size])
            done += len(here)
            progress(done, total, "")
    return batch[have]


def _write(bundle: Bundle, view: View, rows: pa.Table, scratch: BinaryIO, out: Path) -> dict[str, int]:
    """Write the table of predictions block by block; returns how many there are."""
    layout = records.layout(bundle)
    block, found = _block(layout), {"samples": len(rows), "predicted": 0, "failed": 0}
    if bundle.reference is not None:
        found["odd"] = 0
    schema = _table(bundle, view, rows.slice(0, 0), np.empty(0, layout)).schema
    # Dictionaries of probabilities cost time and space and help no reader.
    repeated = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]
    repeated = [name for name, kind in zip(repeated, schema.types, strict=True) if kind != pa.float32()]
    aside = out.with_name(f".{out.name}.tmp")
    try:
        with pq.ParquetWriter(
            aside, schema, compression="zstd", use_dictionary=repeated, write_statistics=CARRIED
        ) as writer:
            scratch.seek(0)
            for start in range(0, len(rows), block):
                some = rows.slice(start, block)
                table = _table(bundle, view, some, np.fromfile(scratch, layout, len(some)))
                writer.write_table(table)
                failed = pc.sum(pc.equal(table["status"], "failed")).as_py()
                found["failed"] += failed
                found["predicted"] += len(table) - failed
                if "odd" in found:
                    found["odd"] += pc.sum(pc.greater(table["oddity"], ODD)).as_py() or 0
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return found


def _block(layout: np.dtype[np.void]) -> int:
    return max(1, min(MOST_ROWS, BLOCK_BYTES // layout.itemsize))


def _drawn(wanted: pa.ChunkedArray) -> NDArray[np.int64]:
    """Rows of at most `drift.MOST` different images, in order."""
    distinct = pc.unique(wanted).drop_null()
    first = pc.index_in(distinct, value_set=wanted.combine_chunks()).to_numpy().astype(np.int64)
    return np.sort(np.random.default_rng(drift.SEED).permutation(first)[: drift.MOST])


def _table(bundle: Bundle, view: View, rows: pa.Table, said: NDArray[np.void]) -> pa.Table:
    """Some rows of the listing beside their records; of what has none, the reason."""
    lacking = pc.and_(pc.equal(rows["status"], "ok"), pa.array(~said["known"]))
    reason = f"not_embedded: the store's view {view.name} has no embedding of it"
    changed = {"status": pc.if_else(lacking, "failed", rows["status"])}
    changed["error"] = pc.if_else(lacking, reason, rows["error"])
    return pa.table({name: rows[name] for name in CARRIED} | changed | records.columns(bundle, said))
