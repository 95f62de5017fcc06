"""Whether images are like the training set: false alarms as often as said, real ones nearly always."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from conftest import Toy
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request, View
from pipeline import bundle, drift, predict
from pipeline.dataset import Selection
from pipeline.train import train

Matrix = NDArray[np.float32]


def alarms(pool: Matrix, other: Matrix | None = None, draws: int = 200, size: int = 100) -> float:
    found = []
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(pool))
        known = drift.reference(pool[order[len(pool) // 2 :]], np.arange(len(pool) - len(pool) // 2))
        batch = pool[order[: len(pool) // 2]][:size]
        if other is not None:
            batch = other[np.random.default_rng(seed).permutation(len(other))[:size]]
        judged = drift.compare(batch, known)
        assert judged is not None and judged["rows"] == len(batch)
        found.append(judged["p_value"] < 0.05)
    return float(np.mean(found))


def test_like_and_unlike_batches() -> None:
    random = np.random.default_rng(0)
    pool = random.gamma(1, size=(300, 40)).astype(np.float32)
    assert alarms(pool, draws=60) <= 0.15
    assert alarms(pool, pool + 0.5, draws=10) == 1


def test_an_odd_embedding_lies_far_from_all() -> None:
    random = np.random.default_rng(0)
    pool = random.normal(size=(900, 10)).astype(np.float32)
    known = drift.reference(pool[:500], np.arange(500))
    usual = drift.oddity(pool[500:], known)
    assert 0.4 < usual.mean() < 0.6 and 0.01 < (usual > 0.95).mean() < 0.12
    assert drift.oddity(pool[:3] + 20, known).tolist() == [1, 1, 1]
    assert drift.oddity(known[:1], known)[0] < 0.9
    assert drift.reference(pool, np.arange(900) // 3).shape == (300, 10)
    assert drift.reference(pool, np.arange(900)).shape == (drift.MOST, 10)


def test_too_few_to_tell() -> None:
    one = np.ones((1, 4), np.float32)
    assert drift.compare(one, one) is None
    assert drift.oddity(one, one).shape == (1,)
    same = drift.compare(np.ones((5, 4), np.float32), np.ones((5, 4), np.float32))
    assert same is not None and same["p_value"] > 0.5


def test_drift_is_an_exit_code(
    tmp_path: Path, photos: Path, permafrost: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ("--store", tmp_path / "store", "--backbone", "tiny")
    permafrost("extract", photos, *store)
    permafrost(
        "train",
        tmp_path / "store",
        "--target",
        "label",
        "--folds",
        2,
        "--split-near-duplicates",
        "--out",
        tmp_path / "b",
    )
    like = permafrost("predict", tmp_path / "b", photos, "--out", tmp_path / "p.parquet", "--max-drift", 0.8)
    assert "cannot be told from the training set" in like.stdout
    for path in photos.rglob("*.png"):
        Image.open(path).convert("L").point(lambda value: value // 3).convert("RGB").save(path)
    unlike = ("predict", tmp_path / "b", photos, "--out", tmp_path / "q.parquet", "--max-drift", 0.8)
    assert "more than --max-drift 0.8; look at the odd ones" in permafrost(*unlike, code=8).stderr
    assert (tmp_path / "q.parquet").is_file()


@pytest.mark.slow
def test_alarms_on_real_images(testdata: Path, tmp_path: Path) -> None:
    dark = tmp_path / "dark"
    for path in (testdata / "hymenoptera").rglob("*.jpg"):
        at = dark / path.relative_to(testdata / "hymenoptera")
        at.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").point(lambda value: value // 2).save(at, quality=95)
    weights = str(testdata / "weights/mobilenet_v2-imagenet.pth")
    found: dict[str, Matrix] = {}
    for name, source in (("plain", testdata / "hymenoptera"), ("dark", dark), ("other", testdata / "caltech20")):
        store = FeatureStore.open_or_new(str(tmp_path / f"{name}-store"))
        extract(
            list_source(str(source)),
            store,
            [Request.parse("tiny"), Request.parse("mobilenet_v2", weights)],
            compile="off",
        )
        for view in store.views():
            found[f"{name} {view.partition('-')[0]}"] = store.load(view)[1]
    for backbone in ("tiny", "mobilenet_v2"):
        assert 0.02 <= alarms(found[f"plain {backbone}"]) <= 0.08
        assert alarms(found[f"plain {backbone}"], found[f"other {backbone}"]) >= 0.95
        print(backbone, "dark", alarms(found[f"plain {backbone}"], found[f"dark {backbone}"]))
        assert alarms(found[f"plain {backbone}"], found[f"dark {backbone}"]) >= 0.95


def test_a_view_is_what_a_bundle_says(tmp_path: Path, photos: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    train(store, "label", tmp_path / "b", folds=3, selection=Selection(near_duplicates=False))
    trained = bundle.load(tmp_path / "b")
    assert isinstance(trained.view, View) and trained.reference is not None and trained.reference.shape == (24, 3)
    found = predict.predict_store(trained, store, tmp_path / "p.parquet")
    assert {"set", "oddity"} < set(pq.read_schema(tmp_path / "p.parquet").names) and found["odd"] == 0
