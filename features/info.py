"""What is in a store, counted."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features import samples
from features.store import ALL, FeatureStore, Present


def describe(store: FeatureStore) -> dict[str, Any]:
    """Count a store's samples, failures and embeddings.

    Returns
    -------
    dict
        ``store``; ``snapshot``, the newest one's number; ``columns``, the sources' own; ``sources``: for each its
        ``samples``, ``failed`` and when its listing last ``changed``; ``failures`` by reason; ``views``: for each its
        ``dim``, ``images``, the ``samples`` listed and readable that it covers, ``bytes`` and ``fingerprint``.
    """
    snapshot = store.snapshot()
    table = snapshot.samples
    readable = table.filter(pc.equal(table["status"], "ok"))
    failed = table.filter(pc.equal(table["status"], "failed"))
    reasons = pc.value_counts(pc.list_element(pc.split_pattern(failed["error"], ": ", max_splits=1), 0))
    views = {}
    for name, view in store.views().items():
        present = Present()
        store.look(view, present)
        covered = pc.is_in(readable["sha256"], value_set=pa.array(sorted(present.sha256), pa.string()))
        views[name] = {
            "dim": view.dim,
            "images": len(present.sha256),
            "samples": pc.sum(covered).as_py() or 0,
            "bytes": sum(store.root.fs.size(store.root.at(f"embeddings/{name}/{part}")) for part in present.parts),
            "fingerprint": view.fingerprint,
        }
    return {
        "store": store.root.path,
        "snapshot": snapshot.number,
        "columns": samples.own_columns(table),
        "sources": {
            name: {
                "samples": pc.sum(pc.equal(table["source"], name)).as_py(),
                "failed": pc.sum(pc.equal(failed["source"], name)).as_py() or 0,
                "changed": snapshot.listed.get(name, {}).get(ALL),
            }
            for name in pc.unique(table["source"]).to_pylist()
        },
        "failures": {entry["values"]: entry["counts"] for entry in reasons.to_pylist()},
        "views": views,
    }
