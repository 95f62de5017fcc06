"""From a store to a bundle: data set, cross-validation, fit, test."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from features.store import FeatureStore, Snapshot
from pipeline import bundle, dataset, evaluate, heads, report
from pipeline.dataset import Task

LIBRARIES = ("permafrost", "scikit-learn", "numpy", "skops")


def train(
    store: FeatureStore,
    target: str,
    out: Path,
    *,
    view: str | None = None,
    head: str | None = None,
    task: Task | None = None,
    folds: int = 5,
    where: str | None = None,
    test_where: str | None = None,
) -> dict[str, Any]:
    """Cross-validate a head, fit it on every training row, test it, and save it as a bundle.

    Parameters
    ----------
    store : FeatureStore
    target : str
        Column of the samples with the labels.
    out : pathlib.Path
        Where the bundle goes; an older bundle there is replaced.
    view : str, optional
        Needed where the store has more than one.
    head : str, optional
        One of `pipeline.heads.HEADS`; by default logreg for classes and ridge for quantities.
    task : str, optional
        ``classification`` or ``regression``; by default read off the target.
    folds : int
    where, test_where : str, optional
        SQL conditions over the samples' columns, for the rows to train on and the rows of the test.

    Returns
    -------
    dict
        The content of `bundle.json`.

    Raises
    ------
    DataError
        If the store does not carry what training needs.
    """
    bundle.require_free(out)
    chosen, snapshot = store.pick_view(view), store.snapshot()
    split = dataset.load(store, chosen, snapshot, target, where=where, test_where=test_where, task=task)
    name = head or heads.DEFAULT[split.task]
    model = heads.make(name, split.task)
    folded = evaluate.cross_validated(model, split.train, split.task, folds)
    with evaluate.one_thread_each():
        model.fit(split.train.X, split.train.y)
    tested = evaluate.tested(model, split.train, split.test, split.task) if split.test else None
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": target,
        "task": split.task,
        "classes": model.classes_.tolist() if split.task == "classification" else None,
        "head": name,
        "view": chosen.to_json(),
        "store": store.root.path,
        "snapshot": {"number": snapshot.number, "digest": snapshot.digest, "pinned": _pin(store, snapshot, out)},
        "settings": {"folds": folds, "where": where, "test_where": test_where, "seed": evaluate.SEED},
        "rows": {
            "train": len(split.train),
            "test": len(split.test) if split.test else 0,
            "left_out": split.left_out,
            "train_copies": len(split.train) - len(np.unique(split.train.groups)),
            "test_copies": split.test_copies,
        },
        "scores": {"cross_validation": folded, "test": tested},
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return bundle.save(out, model, facts, report.markdown(facts))


def _pin(store: FeatureStore, snapshot: Snapshot, out: Path) -> bool:
    try:
        store.pin(snapshot, str(out.absolute()))
    except OSError:
        # Whoever may only read a store can train on it all the same.
        return False
    return True
