"""A bundle and new images become predictions, one row for every sample."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import parts, runs, samples
from features.embedding import Progress
from features.errors import DataError
from features.fill import fill, look_ahead
from features.guards import require_samples
from features.sources import Source
from features.store import FeatureStore, Snapshot
from features.views import Request, View
from pipeline import conformal, dataset
from pipeline.bundle import Bundle

CARRIED = ["source", "id", "uri", "sha256", "status", "error"]


def predict_store(bundle: Bundle, store: FeatureStore) -> pa.Table:
    """Predict every sample that a store lists, from the embeddings it has.

    Returns
    -------
    pyarrow.Table
        See `predict_source`.

    Raises
    ------
    ViewMismatch
        If the store has no view of the bundle's fingerprint.
    """
    view = dataset.matching_view(store, bundle.view)
    return _predict(bundle, store, view, store.snapshot().samples.select(CARRIED))


def predict_source(
    bundle: Bundle,
    source: Source,
    *,
    store: FeatureStore | None = None,
    weights: str | None = None,
    device: str = "auto",
    progress: Progress = lambda done, total, busy: None,
) -> pa.Table:
    """Embed what a source has with the bundle's own view, and predict it.

    Parameters
    ----------
    bundle : Bundle
    source : Source
    store : FeatureStore, optional
        Embeddings in it are not computed again, and new ones are added to it; its listing stays as it is.
    weights : str, optional
        Where the weight file is now.
    device : str
    progress : callable, optional

    Returns
    -------
    pyarrow.Table
        One row per sample, by source and id: ``source, id, uri, sha256, status, error, prediction``, and for heads
        that know probabilities ``p_<class>`` and ``set``, the classes of the conformal set; quantities have the range
        from ``low`` to ``high``. Of several targets ``prediction_<target>``, ``p_<target>_<class>`` and so on.
        Samples that cannot be read have a reason and no prediction.

    Raises
    ------
    ViewMismatch
        If the weights, or the store's view of that name, are not those of the bundle.
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="permafrost-") as scratch:
            passing = FeatureStore.open_or_new(scratch)
            return predict_source(bundle, source, store=passing, weights=weights, device=device, progress=progress)
    require_samples(source, Snapshot(0, "", samples.empty(), {}))
    request = bundle.view.request
    if weights:
        request = replace(Request.parse(request.backbone, weights), layer=request.layer, pooling=request.pooling)
        request = request.resolved(bundle.view.request.precision)
    name = _name_of(bundle.view, store)
    ahead = look_ahead(source, store, {name: request}, store.snapshot(), expected=bundle.view)
    filled = fill(source, store, ahead, device=device, progress=progress, expected=bundle.view)
    # Predictions are not listed, so no snapshot will ever make these files needless.
    runs.drop(store.root, filled.pending)
    return _predict(bundle, store, filled.views[0], filled.rows.select(CARRIED))


def write(table: pa.Table, out: Path) -> None:
    """Write predictions as Parquet, whole or not at all."""
    aside = out.with_name(f".{out.name}.tmp")
    try:
        pq.write_table(table, aside, compression="zstd")
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def require_writable(out: Path) -> None:
    """Check, before the work, that predictions may be written there.

    Raises
    ------
    DataError
        If it is no Parquet file's name, or its folder is not there.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise DataError(f"predictions are written as Parquet; name --out {out.with_suffix('.parquet')}")
    if not out.parent.is_dir():
        raise DataError(f"folder {out.parent} for --out is not there; make it first")


def _name_of(view: View, store: FeatureStore) -> str:
    """Name of the view in a store that has a bundle's fingerprint, or will have it."""
    same = [name for name, other in store.views().items() if other.fingerprint == view.fingerprint]
    return same[0] if same else view.name


def _predict(bundle: Bundle, store: FeatureStore, view: View, rows: pa.Table) -> pa.Table:
    frame = rows.to_pandas()
    found, matrix = parts.gather(store.root, view, rows["sha256"])
    there = found & frame["status"].eq("ok").to_numpy()
    lacking = ~there & frame["status"].eq("ok").to_numpy()
    frame.loc[lacking, "status"] = "failed"
    frame.loc[lacking, "error"] = f"not_embedded: the store's view {view.name} has no embedding of it"
    X, columns = matrix[there], dict[str, pa.Array]()
    for target in bundle.facts["targets"]:
        columns |= _columns(bundle.heads[target["name"]], target, X, there, len(bundle.facts["targets"]) > 1)
    table = pa.Table.from_pandas(frame, schema=rows.schema, preserve_index=False)
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table.sort_by([("source", "ascending"), ("id", "ascending")])


def _columns(
    head: Any, target: dict[str, Any], X: NDArray[np.float32], there: NDArray[np.bool_], of_several: bool
) -> dict[str, pa.Array]:
    """Predictions of one target, its probabilities, and its conformal sets or ranges; of several they bear its name."""
    classes, suffix = target["classes"], f"_{target['name']}" if of_several else ""
    # Estimators refuse a matrix without rows.
    predicted = head.predict(X) if len(X) else np.array(classes or [0.0])[:0]
    columns = {f"prediction{suffix}": _spread(predicted, there)}
    misfit = (target.get("conformal") or {}).get("threshold")
    if misfit is not None and classes is None:
        ends = conformal.ranges(np.asarray(predicted, float), misfit, target["log"])
        columns |= {f"{name}{suffix}": _spread(end, there) for name, end in zip(("low", "high"), ends, strict=True)}
    if hasattr(head, "predict_proba"):
        shares = head.predict_proba(X) if len(X) else np.empty((0, len(classes)))
        columns |= {f"p{suffix}_{name}": _spread(share, there) for name, share in zip(classes, shares.T, strict=True)}
        if misfit is not None:
            chosen = [[str(classes[place]) for place in np.flatnonzero(row)] for row in conformal.sets(shares, misfit)]
            columns[f"set{suffix}"] = _spread(pa.array(chosen, pa.list_(pa.string())), there)
    return columns


def _spread(values: NDArray[Any] | pa.Array, there: NDArray[np.bool_]) -> pa.Array:
    """Values of the samples that have one, null for the others."""
    place = np.where(there, np.cumsum(there) - 1, 0)
    return pa.array(values).take(pa.array(place, mask=~there))
