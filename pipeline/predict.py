"""A bundle and new images become predictions, one row for every sample."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import parts, runs, samples
from features.embedding import Progress
from features.errors import BundleError, DataError, Drifted
from features.fill import fill, look_ahead
from features.guards import require_samples
from features.sources import Source
from features.store import FeatureStore, Snapshot
from features.views import Request, View
from pipeline import conformal, dataset, drift
from pipeline.audit import in_short
from pipeline.bundle import Bundle

SIGNIFICANT = 0.05
ODD = 0.99
"""Share of the training embeddings that lie less far from the others than an odd one does."""


@dataclass(frozen=True)
class Predicted:
    """Predictions, and whether what they are of is like what the heads were trained on.

    Attributes
    ----------
    table : pyarrow.Table
        One row per sample, by source and id: ``source, id, uri, sha256, status, error, prediction``, and for heads
        that know probabilities ``p_<class>`` and ``set``, the classes of the conformal set; quantities have the range
        from ``low`` to ``high``. Of several targets ``prediction_<target>``, ``p_<target>_<class>`` and so on.
        ``oddity`` is the share of training embeddings that lie less far from the others. Samples that cannot be read
        have a reason and no prediction.
    drift : dict or None
        See `pipeline.drift.compare`; None for bundles without reference embeddings, and for fewer than two images.
    """

    table: pa.Table
    drift: dict[str, Any] | None


CARRIED = ["source", "id", "uri", "sha256", "status", "error"]


def predict_store(bundle: Bundle, store: FeatureStore) -> Predicted:
    """Predict every sample that a store lists, from the embeddings it has.

    Returns
    -------
    Predicted

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
) -> Predicted:
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
    Predicted

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


def counts(predicted: Predicted) -> dict[str, Any]:
    """How many ``samples`` there are, ``predicted`` and ``failed``, how many are ``odd``, and the ``drift``."""
    table = predicted.table
    failed = pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
    found: dict[str, Any] = {"samples": len(table), "predicted": len(table) - failed, "failed": failed}
    if "oddity" in table.column_names:
        found["odd"] = pc.sum(pc.greater(table["oddity"], ODD)).as_py() or 0
    return found | {"drift": predicted.drift}


def in_words(found: dict[str, Any]) -> str:
    """What a comparison with the training set means."""
    if found["p_value"] >= SIGNIFICANT:
        return f"as a whole they cannot be told from the training set (p {found['p_value']:.3f})"
    told = f"AUC {found['auc']:.3f}, p {found['p_value']:.3f}"
    return f"as a whole they can be told from the training set ({told}): do not trust the scores of the bundle for them"


def require_alike(predicted: Predicted, max_drift: float) -> None:
    """Check that a batch cannot be told from the training set better than by some AUC, chance aside.

    Raises
    ------
    DataError
        If the bundle has no reference embeddings.
    Drifted
        If it can.
    """
    found = predicted.drift
    if found is None:
        raise DataError("--max-drift needs a bundle with reference embeddings, and two images; train it again")
    if found["auc"] > max_drift and found["p_value"] < SIGNIFICANT:
        raise Drifted(
            f"the images can be told from the training set with AUC {found['auc']:.3f}, more than --max-drift "
            f"{max_drift:g}; look at the odd ones, and label some of them"
        )


def _name_of(view: View, store: FeatureStore) -> str:
    """Name of the view in a store that has a bundle's fingerprint, or will have it."""
    same = [name for name, other in store.views().items() if other.fingerprint == view.fingerprint]
    return same[0] if same else view.name


def _predict(bundle: Bundle, store: FeatureStore, view: View, rows: pa.Table) -> Predicted:
    readable = rows.filter(pc.equal(rows["status"], "ok"))["sha256"]
    wanted = pc.unique(readable)
    drawn = set(np.random.default_rng(drift.SEED).permutation(len(wanted))[: drift.MOST].tolist())
    # Part by part, since a listing may stand for more embeddings than memory holds.
    known, batch = list[pa.Table](), list[NDArray[np.float32]]()
    for _, keys, X in parts.each(store.root, view):
        place = pc.index_in(pa.array(keys, pa.string()), wanted).to_numpy(zero_copy_only=False)
        inside = np.flatnonzero(~np.isnan(place.astype(float)))
        if len(inside):
            known.append(_told(bundle, [keys[row] for row in inside], X[inside]))
            batch.append(X[[row for row in inside if int(place[row]) in drawn]])
    told = pa.concat_tables(known or [_told(bundle, [], np.empty((0, view.dim), np.float32))])
    place = pc.index_in(rows["sha256"].combine_chunks(), told["sha256"].combine_chunks())
    readable = pc.equal(rows["status"], "ok").combine_chunks()
    place = pc.if_else(readable, place, None)
    lacking = pc.and_(readable, pc.is_null(place))
    reason = f"not_embedded: the store's view {view.name} has no embedding of it"
    for name, value in (("status", "failed"), ("error", reason)):
        changed = pc.if_else(lacking, value, rows[name].combine_chunks())
        rows = rows.set_column(rows.column_names.index(name), name, changed)
    for name in told.column_names[1:]:
        rows = rows.append_column(name, told[name].combine_chunks().take(place))
    table = rows.sort_by([("source", "ascending"), ("id", "ascending")])
    found = None
    if bundle.reference is not None and batch:
        with _blamed_on_the_bundle():
            found = drift.compare(np.concatenate(batch), bundle.reference)
    return Predicted(table, found)


@contextmanager
def _blamed_on_the_bundle() -> Iterator[None]:
    try:
        yield
    # Embeddings of a store are sound, so whatever scikit-learn raises is about what the bundle made of them.
    except Exception as error:
        raise BundleError(f"the bundle cannot predict: {in_short(error)}; train it again") from None


def _told(bundle: Bundle, keys: list[str], X: NDArray[np.float32]) -> pa.Table:
    """What the heads say of some images, by their SHA-256."""
    columns: dict[str, Any] = {"sha256": pa.array(keys, pa.string())}
    targets = bundle.facts["targets"]
    with _blamed_on_the_bundle():
        for target in targets:
            columns |= _columns(bundle.heads[target["name"]], target, X, len(targets) > 1)
        if bundle.reference is not None:
            columns["oddity"] = pa.array(drift.oddity(X, bundle.reference), pa.float64())
        return pa.table(columns)


def _columns(head: Any, target: dict[str, Any], X: NDArray[np.float32], of_several: bool) -> dict[str, pa.Array]:
    """Predictions of one target, its probabilities, and its conformal sets or ranges; of several they bear its name."""
    classes, suffix = target["classes"], f"_{target['name']}" if of_several else ""
    # Estimators refuse a matrix without rows.
    predicted = head.predict(X) if len(X) else np.array(classes or [0.0])[:0]
    columns = {f"prediction{suffix}": pa.array(predicted)}
    misfit = (target.get("conformal") or {}).get("threshold")
    if misfit is not None and classes is None:
        ends = conformal.ranges(np.asarray(predicted, float), misfit, target["log"])
        columns |= {f"{name}{suffix}": pa.array(end) for name, end in zip(("low", "high"), ends, strict=True)}
    if hasattr(head, "predict_proba"):
        shares = np.asarray(head.predict_proba(X) if len(X) else np.empty((0, len(classes))), float)
        columns |= {f"p{suffix}_{name}": pa.array(share) for name, share in zip(classes, shares.T, strict=True)}
        if misfit is not None:
            chosen = [[str(classes[place]) for place in np.flatnonzero(row)] for row in conformal.sets(shares, misfit)]
            columns[f"set{suffix}"] = pa.array(chosen, pa.list_(pa.string()))
    return columns
