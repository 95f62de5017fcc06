"""What is in a store, counted."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features import parts, samples
from features.parts import Present
from features.store import FeatureStore


def describe(store: FeatureStore) -> dict[str, Any]:
    """Count a store's samples, failures and embeddings.

    Parameters
    ----------
    store : FeatureStore

    Returns
    -------
    dict
        ``store``; ``snapshot``, the newest one's number; ``columns``, the sources' own; ``sources``: for each its
        ``samples``, ``failed`` and when its listing last ``changed``; ``failures`` by reason; ``views``: for each its
        ``dim``, ``images``, the ``samples`` listed and readable that it covers and those it is ``lacking``, ``parts``,
        ``bytes`` and ``fingerprint``; ``snapshots``: how many are ``kept``, ``pinned``, and their ``bytes``;
        ``pending``, the files that runs left which did not end.

    Examples
    --------
    >>> from features.store import FeatureStore
    >>> told = describe(FeatureStore.open("store"))
    >>> told["snapshot"], told["columns"], told["failures"]
    (1, ['label', 'split'], {})
    >>> [(view["dim"], view["images"], view["lacking"]) for view in told["views"].values()]
    [(1280, 24, 0)]
    """
    snapshot = store.snapshot()
    table = snapshot.samples
    readable = table.filter(pc.equal(table["status"], "ok"))
    failed = table.filter(pc.equal(table["status"], "failed"))
    reasons = pc.value_counts(pc.list_element(pc.split_pattern(failed["error"], ": ", max_splits=1), 0))
    views = {}
    for name, view in store.views().items():
        present = Present()
        parts.look(store.root, view, present)
        covered = pc.is_in(readable["sha256"], value_set=pa.array(sorted(present.sha256), pa.string()))
        views[name] = {
            "dim": view.dim,
            "images": len(present.sha256),
            "samples": pc.sum(covered).as_py() or 0,
            "lacking": len(readable) - (pc.sum(covered).as_py() or 0),
            "parts": len(present.parts),
            "bytes": sum(store.root.size(f"embeddings/{name}/{part}") for part in present.parts),
            "fingerprint": view.fingerprint,
        }
    files = store.root.names("snapshots")
    kept = [name for name in files if name.endswith(".parquet")]
    return {
        "store": store.root.path,
        "snapshot": snapshot.number,
        "columns": samples.own_columns(table),
        "sources": {
            name: {
                "samples": pc.sum(pc.equal(table["source"], name)).as_py(),
                "failed": pc.sum(pc.equal(failed["source"], name)).as_py() or 0,
                "changed": snapshot.listed.get(name, {}).get("0/1"),
            }
            for name in pc.unique(table["source"]).to_pylist()
        },
        "failures": {entry["values"]: entry["counts"] for entry in reasons.to_pylist()},
        "views": views,
        "snapshots": {
            "kept": len(kept),
            "pinned": sum(name.endswith(".pin") for name in files),
            "bytes": sum(store.root.size(f"snapshots/{name}") for name in kept),
        },
        "pending": len(store.root.names("pending")),
    }
