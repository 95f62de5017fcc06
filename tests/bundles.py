"""Small bundles of every kind of head, and what an attacker can do to one: change what is in it, and sign it again."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)

from features.views import Request, View
from pipeline import bundle, heads, tuning
from pipeline.folds import Examples
from pipeline.targets import Task
from pipeline.tuning import Recipe

DIM = 4
ROWS = 60
Head = tuple[str, Task, str]
SMALL: dict[str, dict[Any, Any]] = {
    "random_forest": {
        "classification": lambda: RandomForestClassifier(4, n_jobs=-1, random_state=0),
        "regression": lambda: RandomForestRegressor(4, n_jobs=-1, random_state=0),
    },
    "hist_gradient_boosting": {
        "classification": lambda: HistGradientBoostingClassifier(**heads.BOOSTING | {"max_iter": 3}),
        "regression": lambda: HistGradientBoostingRegressor(**heads.BOOSTING | {"max_iter": 3}),
    },
}


def facts_of(fitted: dict[str, Any], dim: int = DIM, **more: Any) -> dict[str, Any]:
    """As little as a bundle must say of its heads."""
    targets = [
        {"name": name, "classes": None if (known := getattr(head, "classes_", None)) is None else known.tolist()}
        | {"conformal": {"threshold": 0.5}, "log": False}
        for name, head in fitted.items()
    ]
    view = View("toy", {"backbone": "toy"}, dim, Request("toy", "V1"))
    return {"targets": targets, "view": view.to_json()} | more


def fitted_head(name: str, task: Task, option: str = "") -> Any:
    """A head of few trees and embeddings of `DIM` numbers; the option is ``calibrate`` or ``log``."""
    random = np.random.default_rng(0)
    X = random.normal(size=(ROWS, DIM)).astype(np.float32)
    y: Any = {
        "binary": np.where(X[:, 0] > 0, "yes", "no"),
        "multiclass": np.arange(ROWS) % 3,
        "regression": np.exp(X[:, 0]),
    }[task]
    recipe = Recipe(task, name, calibrate=option == "calibrate", log=option == "log")
    with mock.patch.dict(heads.HEADS, SMALL):
        return tuning.fit(recipe, Examples(X, y, task, np.arange(ROWS))).estimator


def saved(folder: Path, *kinds: Head) -> Path:
    """A bundle with a head of each kind, by the names a, b ..."""
    fitted = {name: fitted_head(*kind) for name, kind in zip("abc", kinds, strict=False)}
    known = np.random.default_rng(1).normal(size=(20, DIM)).astype(np.float32)
    bundle.save(folder, fitted, facts_of(fitted), {"report.html": b"report"}, known)
    return folder


def sign(folder: Path, **changes: Any) -> Path:
    """Make `bundle.json` fit the files that it names, and say what else it is to say."""
    facts = json.loads((folder / "bundle.json").read_bytes()) | changes
    for name in facts["files"]:
        facts["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    facts["sha256"] = bundle._digest(facts)
    (folder / "bundle.json").write_text(json.dumps(facts))
    return folder


def unzipped(folder: Path) -> dict[str, bytes]:
    """What is in `head.skops`."""
    with zipfile.ZipFile(folder / "head.skops") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    """The content of such a file, with members that may bear one name."""
    with zipfile.ZipFile(made := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def nodes_of(schema: Any) -> list[dict[str, Any]]:
    """Every node of a schema, the root first."""
    found, waiting = [], [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if "__loader__" in node:
                found.append(node)
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return found
