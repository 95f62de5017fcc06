"""From a bundle and a store to a file of predictions: every sample, in order, within bounds of memory."""

from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from conftest import Toy, draw, peak_memory, predicted, stored
from features import parts, samples
from features.errors import ViewMismatch
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request, View
from pipeline import bundle, drift, heads, predict
from pipeline.bundle import Bundle
from pipeline.dataset import Selection
from pipeline.train import train

LOOSE = Selection(near_duplicates=False)
TRAINED = Selection(where="split = 'train'", near_duplicates=False)
DIM = 8
VIEW = View("v", {"backbone": "none"}, DIM, Request("none", "V1"))


@pytest.fixture
def store(tmp_path: Path, photos: Path, toy: Toy) -> FeatureStore:
    opened = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), opened, [toy.request])
    return opened


def drawn(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((rows, DIM), np.float32)


def keys(rows: int) -> list[str]:
    return [hashlib.sha256(b"%d" % row).hexdigest() for row in range(rows)]


def trained(y: NDArray[Any], head: str = "logreg") -> Bundle:
    """A bundle with one head, and a reference."""
    quantity = y.dtype == np.float64
    fitted = heads.make(head, "regression" if quantity else "multiclass").fit(drawn(len(y)), y)
    target = {"name": "y", "classes": None if quantity else fitted["head"].classes_.tolist(), "log": False}
    facts = {"targets": [target | {"conformal": {"threshold": 0.9}}], "view": VIEW.to_json()}
    return Bundle({"y": fitted}, facts, drawn(100))


def filled(place: Path, rows: int, part: int = 2000, reverse: bool = False) -> FeatureStore:
    """A store of drawn embeddings, and a listing that has them in another order."""
    made, names, X = FeatureStore.open_or_new(str(place)), keys(rows), drawn(rows)
    made.add_view(VIEW)
    for start in range(0, rows, part)[:: -1 if reverse else 1]:
        parts.write(made.root, VIEW, names[start : start + part], X[start : start + part], {})
    known = {"source": ["s"] * rows, "id": [name[::-1] for name in names], "sha256": names, "status": ["ok"] * rows}
    columns = [known.get(name, pa.nulls(rows)) for name in samples.SCHEMA.names]
    made.publish("s", pa.table(columns, samples.SCHEMA.names).cast(samples.SCHEMA), "2025-01-01T00:00:00+00:00")
    return made


def test_predictions_are_those_that_were_scored(store: FeatureStore, tmp_path: Path, photos: Path, toy: Toy) -> None:
    train(store, "label", tmp_path / "bundle", selection=TRAINED, folds=3)
    loaded = bundle.load(tmp_path / "bundle")
    (photos / "test/red/broken.png").write_bytes(b"no image")
    before, listing = toy.embedded, store.snapshot()
    draw(photos / "test/red/new.png", (230, 30, 30))
    out = tmp_path / "p.parquet"
    for _ in range(2):
        # The second time adds nothing to the store, and replaces what is there.
        found = predict.predict_source(loaded, list_source(str(photos / "test")), out, store=store)
        assert toy.embedded == before + 1 and len(stored(store, loaded.view)) == 25
        assert (found["samples"], found["predicted"], found["failed"]) == (8, 7, 1)
        assert len(store.root.names(f"embeddings/{loaded.view.name}")) == 3
    table = pd.read_parquet(out).set_index("id")
    assert store.snapshot().digest == listing.digest and not store.root.names("pending")
    assert len(table) == 8
    assert table.loc["red/broken.png", "error"].startswith("not_an_image: ")
    read = table.drop(index="red/broken.png")
    assert (read["prediction"] == read.index.str.split("/").str[0]).all()
    assert np.allclose(read[["p_blue", "p_green", "p_red"]].sum(axis=1), 1)
    assert table.loc["red/broken.png", ["prediction", "p_red"]].isna().all()
    predict.predict_source(loaded, list_source(str(photos / "test")), out)
    assert pd.read_parquet(out).set_index("id")["prediction"].equals(table["prediction"])
    listed = predicted(loaded, store, out)
    assert len(listed) == 24 and (listed["prediction"] == listed["id"].str.split("/").str[1]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "p.parquet", "photos", "store"]


def test_of_like_views_the_fullest_is_read(store: FeatureStore, tmp_path: Path, photos: Path, toy: Toy) -> None:
    train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    trained, before = bundle.load(tmp_path / "bundle"), toy.embedded
    twin = dataclasses.replace(trained.view, name="a-twin")
    store.add_view(twin)
    (name, *_), X = keys(1), np.zeros((1, twin.dim), np.float32)
    parts.write(store.root, twin, [name], X, {})
    assert predict.predict_store(trained, store, tmp_path / "p.parquet")["failed"] == 0
    predict.predict_source(trained, list_source(str(photos)), tmp_path / "p.parquet", store=store)
    assert toy.embedded == before and len(stored(store, twin)) == 1


def test_predictions_exist_where_nothing_could_be_read(store: FeatureStore, tmp_path: Path) -> None:
    train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"")
    out = tmp_path / "p.parquet"
    predict.predict_source(bundle.load(tmp_path / "bundle"), list_source(str(tmp_path / "bad")), out)
    table = pq.read_table(out)
    assert table["prediction"].to_pylist() == [None] and table["error"].to_pylist() == ["empty: the file has no bytes"]
    assert sorted(path.name for path in tmp_path.glob("*p.parquet*")) == ["p.parquet"]


def test_other_weights_are_refused(store: FeatureStore, tmp_path: Path, photos: Path, toy: Toy) -> None:
    train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    loaded, out = bundle.load(tmp_path / "bundle"), tmp_path / "p.parquet"
    with pytest.raises(ViewMismatch, match="weights is 'V1', asked for 'V2'"):
        predict.predict_source(loaded, list_source(str(photos)), out, weights="V2")
    other = FeatureStore.open_or_new(str(tmp_path / "other"))
    extract(list_source(str(photos)), other, [Request("toy", "V2")], view=loaded.view.name)
    with pytest.raises(ViewMismatch, match="weights is 'V2', asked for 'V1'"):
        predict.predict_store(loaded, other, out)
    with pytest.raises(ViewMismatch, match="weights is 'V1', asked for 'V2'"):
        predict.predict_source(loaded, list_source(str(photos)), out, store=other)
    assert not out.exists()


LABELS = {
    "names": np.array(["c", "a", "b"])[np.arange(300) % 3],
    "numbers": np.array([7, 3, 5])[np.arange(300) % 3],
    "booleans": np.arange(300) % 2 == 0,
    "quantities": drawn(300)[:, 0].astype(float) * 3 + 1,
}


@pytest.mark.parametrize("head", ["logreg", "ridge", "knn"])
@pytest.mark.parametrize("kind", LABELS)
def test_what_is_written_is_what_the_head_says(
    kind: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = LABELS[kind]
    if (kind, head) == ("quantities", "logreg"):
        return
    monkeypatch.setattr(predict, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(parts, "ROWS", 64)
    said, made = trained(y, head), filled(tmp_path / "store", 500, 120)
    rows = predicted(said, made, tmp_path / "p.parquet").set_index("sha256").loc[keys(500)]
    assert rows["id"].tolist() == [name[::-1] for name in keys(500)]
    table, X = pq.read_table(tmp_path / "p.parquet"), drawn(500)
    assert table["id"].to_pylist() == sorted(rows["id"]) and table["prediction"].type == pa.array(y).type
    assert np.allclose(rows["oddity"], drift.oddity(X, drawn(100)))
    if kind == "quantities":
        assert np.allclose(rows["prediction"], said.heads["y"].predict(X))
        assert np.allclose(rows["high"] - rows["prediction"], 0.9)
        return
    assert rows["prediction"].tolist() == said.heads["y"].predict(X).tolist()
    if head == "ridge":
        assert not [name for name in table.column_names if name.startswith(("p_", "set"))]
        return
    classes = said.facts["targets"][0]["classes"]
    shares = rows[[f"p_{name}" for name in classes]].to_numpy()
    assert np.allclose(shares, said.heads["y"].predict_proba(X), atol=1e-6)
    assert np.abs(shares.sum(axis=1, dtype=float) - 1).max() < 1e-6
    assert np.array_equal(np.array(classes)[shares.argmax(axis=1)], rows["prediction"])
    chosen = shares.astype(float) >= 1 - 0.9
    assert [list(some) for some in rows["set"]] == [[str(classes[at]) for at in np.flatnonzero(row)] for row in chosen]


def test_every_sample_has_its_row(tmp_path: Path) -> None:
    made, names = FeatureStore.open_or_new(str(tmp_path / "store")), keys(6)
    made.add_view(VIEW)
    for some in ([0, 1, 2], [2, 1, 3]):  # As two runs at the same moment leave it.
        parts.write(made.root, VIEW, [names[row] for row in some], drawn(6)[some], {})
    listed = [("d", 3, "ok"), ("b", 1, "ok"), ("a", 2, "ok"), ("c", 1, "ok"), ("e", 5, "ok"), ("f", 0, "failed")]
    rows = [{"source": "s", "id": key, "sha256": names[row], "status": status} for key, row, status in listed]
    made.publish("s", pa.Table.from_pylist(rows, samples.SCHEMA), "2025-01-01T00:00:00+00:00")
    said = trained(LABELS["names"])
    told = predicted(said, made, tmp_path / "p.parquet").set_index("id")
    expected = said.heads["y"].predict(drawn(6)[[2, 1, 1, 3]]).tolist()
    assert told.index.tolist() == list("abcdef") and told["prediction"].tolist()[:4] == expected
    assert told.loc[["e", "f"], ["prediction", "p_a", "set", "oddity"]].isna().all(axis=None)
    assert told["status"].tolist() == ["ok"] * 4 + ["failed"] * 2
    assert told.loc["e", "error"] == "not_embedded: the store's view v has no embedding of it"
    found = predict.predict_store(said, made, tmp_path / "p.parquet")
    assert (found["samples"], found["predicted"], found["failed"]) == (6, 4, 2)
    assert found["drift"]["rows"] == 3


def test_a_store_without_samples_is_a_table_without_rows(tmp_path: Path) -> None:
    said, out = trained(LABELS["names"]), tmp_path / "p.parquet"
    made = FeatureStore.open_or_new(str(tmp_path / "store"))
    made.add_view(VIEW)
    found = predict.predict_store(said, made, out)
    assert found == {"samples": 0, "predicted": 0, "failed": 0, "odd": 0, "drift": None}
    assert pq.read_metadata(out).num_rows == 0 and "p_a" in pq.read_schema(out).names


def test_drift_does_not_depend_on_the_order_of_parts(tmp_path: Path) -> None:
    said = trained(LABELS["names"])
    found = [
        predict.predict_store(
            said, filled(tmp_path / f"{reverse}", 1200, 100, reverse), tmp_path / f"{reverse}.parquet"
        )
        for reverse in (False, True)
    ]
    assert found[0] == found[1] and found[0]["drift"]["rows"] == drift.MOST
    assert pq.read_table(tmp_path / "True.parquet").equals(pq.read_table(tmp_path / "False.parquet"))


def test_what_fails_half_way_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, made, out = trained(LABELS["names"]), filled(tmp_path / "store", 300, 100), tmp_path / "p.parquet"
    predict.predict_store(said, made, out)
    before, told = out.read_bytes(), said.heads["y"].predict_proba
    calls: list[int] = []

    def tired(X: NDArray[np.float32]) -> Any:
        calls.append(len(X))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return told(X)

    monkeypatch.setattr(said.heads["y"], "predict_proba", tired, raising=False)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_store(said, made, out)
    monkeypatch.undo()
    write = pq.ParquetWriter.write_table
    monkeypatch.setattr(predict, "BLOCK_BYTES", 2000)

    def full(writer: pq.ParquetWriter, table: pa.Table) -> None:
        write(writer, table)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        predict.predict_store(said, made, out)
    assert out.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["p.parquet", "store"]


def test_memory_does_not_grow_with_rows_times_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = 20_000, 500
    said, made = trained(np.arange(1000) % classes), filled(tmp_path / "store", rows)
    monkeypatch.setattr(predict, "BLOCK_BYTES", 2**20)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        found = predict.predict_store(said, made, tmp_path / "p.parquet")
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    # Less than the probabilities alone.
    assert found["predicted"] == rows and peak < 4 * rows * classes


@pytest.mark.slow
def test_the_peak_memory_of_the_process(tmp_path: Path) -> None:
    said = trained(np.arange(2000) % 500)
    assert said.reference is not None
    bundle.save(tmp_path / "b", said.heads, said.facts, {}, said.reference)
    peaks = {}
    for rows in (1000, 300_000):
        filled(tmp_path / f"{rows}", rows)
        command = ["predict", tmp_path / "b", tmp_path / f"{rows}", "--out", tmp_path / "p.parquet", "--json"]
        peaks[rows] = peak_memory(*command)
        assert pq.read_metadata(tmp_path / "p.parquet").num_rows == rows
    # The probabilities alone take 600 MB.
    assert peaks[300_000] - peaks[1000] < 2**29
