"""What an earlier version wrote is read for ever: `tests/formats/N` holds a store and a bundle of format N."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import stored
from features import info, samples
from features.parts import FORMAT
from features.store import FeatureStore
from pipeline import bundle, predict

FORMATS = Path(__file__).with_name("formats")


@pytest.fixture(params=sorted(FORMATS.iterdir()), ids=lambda folder: f"format {folder.name}")
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "old"))


def test_every_format_is_kept() -> None:
    assert {int(folder.name) for folder in FORMATS.iterdir()} == set(range(1, max(FORMAT, bundle.FORMAT) + 1))


def test_an_old_store_is_read(old: Path) -> None:
    store = FeatureStore.open(str(old / "store"))
    snapshot, view = store.snapshot(), store.views()["toy-V1-penultimate"]
    assert snapshot.number == 2 and len(store.snapshot(1).samples) == 4
    assert snapshot.samples["status"].to_pylist() == ["ok"] * 8 + ["failed"]
    assert snapshot.samples.schema.names == [*samples.SCHEMA.names, "label"]
    expected = {row["sha256"]: row["id"] for row in snapshot.samples.to_pylist()}
    for key, vector in stored(store, view).items():
        number = int(expected[key].removesuffix(".png"))
        assert (vector == np.array([number % 2, number / 8, 1], np.float32)).all()
    assert info.describe(store)["views"][view.name]["samples"] == 8


def test_an_old_store_goes_on_as_the_same_store(old: Path) -> None:
    store = FeatureStore.open(str(old / "store"))
    before = store.snapshot()
    assert store.publish("photos", before.samples, "2026-11-22T00:00:00+00:00") == (before, "unchanged")


def test_an_old_bundle_whose_backbone_is_unknown_says_so(old: Path, photos: Path, permafrost: Any) -> None:
    said = permafrost("predict", old / "bundle", photos, "--out", old / "p.parquet", code=2).stderr
    assert "backbone 'toy' is unknown" in said and said.count("\n") == 1


def test_an_old_bundle_predicts(old: Path) -> None:
    predict.predict_store(bundle.load(old / "bundle"), FeatureStore.open(str(old / "store")), old / "p.parquet")
    assert pq.read_table(old / "p.parquet")["prediction"].to_pylist() == ["even", "odd"] * 4 + [None]
