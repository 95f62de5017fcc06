from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conftest import Toy, draw
from features.errors import DataError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import controls, report
from pipeline.compare import compare
from pipeline.dataset import Selection

APART = Selection(near_duplicates=False)


@pytest.fixture
def store(tmp_path: Path, photos: Path, toy: Toy) -> FeatureStore:
    opened = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), opened, [toy.request, Request("toy", "V2")])
    return opened


def test_a_leaderboard_is_in_the_order_of_its_differences(store: FeatureStore) -> None:
    told: list[int] = []
    facts = compare(
        store,
        "label",
        names=["logreg", "knn", "ridge"],
        selection=APART,
        folds=3,
        progress=lambda done, total, busy: told.append(done),
    )
    board = facts["leaderboard"]
    assert len(board) == 6 and told == list(range(1, 19))
    values = [row["scores"]["accuracy"]["value"] for row in board]
    assert values == sorted(values, reverse=True)
    for row, value in zip(board, values, strict=True):
        assert row["behind"]["value"] == pytest.approx(values[0] - value)
        assert row["behind"]["low"] <= row["behind"]["value"] <= row["behind"]["high"]
        assert row["clear"] == (row["behind"]["low"] > 0)
    # The two views hold the same embeddings.
    by_head = {(row["view"], row["head"]): row["scores"]["accuracy"] for row in board}
    assert by_head["toy-V1-penultimate", "knn"] == by_head["toy-V2-penultimate", "knn"]
    assert 0 <= facts["flatters"] < 0.1 and facts["rows"]["train"] == 24
    columns, rows, title = report.leaderboard(facts)
    assert len(rows) == 6 and len(columns) == len(rows[0]) and title.startswith("label: 24 samples, 24 of them")


def test_the_table_and_the_json_say_the_same(store: FeatureStore, permafrost: Callable[..., object]) -> None:
    asked = ["compare", store.root.path, "--target", "label", "--heads", "logreg,tree", "--folds", 3]
    asked += ["--views", "toy-V1-penultimate", "--split-near-duplicates"]
    table, as_json = permafrost(*asked).stdout, json.loads(permafrost(*asked, "--json").stdout)  # type: ignore[attr-defined]
    for row in as_json["leaderboard"]:
        score = row["scores"]["accuracy"]
        assert f"{score['value']:.4f} [{score['low']:.3f}, {score['high']:.3f}]" in table
    assert table.index("logreg") < table.index("tree") or as_json["leaderboard"][0]["head"] == "tree"


def test_what_cannot_be_compared_is_said(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="head 'magic' is unknown"):
        compare(store, "label", names=["logreg", "magic"], selection=APART)
    with pytest.raises(DataError, match="has no view other"):
        compare(store, "label", views=["other"], selection=APART)
    with pytest.raises(DataError, match="no view to compare"):
        compare(FeatureStore.open_or_new(str(tmp_path / "empty")), "label", selection=APART)


def test_file_facts_are_what_the_listing_tells(store: FeatureStore) -> None:
    samples = store.snapshot().samples.to_pandas()
    found = controls.file_facts(samples)
    assert found.shape == (24, 6) and found.dtype == np.float32
    assert (found[:, :2] == [20, 16]).all() and (found[:, 5] == 1).all()


def test_pixels_are_read_again_where_the_file_is_the_same(store: FeatureStore, photos: Path) -> None:
    samples = store.snapshot().samples.to_pandas()
    before = controls.pixels(samples)
    assert before.shape == (24, 204) and np.isfinite(before).all()
    red = samples["label"].eq("red").to_numpy()
    assert (before[red, 192] > before[red, 193]).all()  # Mean red above mean green.
    draw(photos / samples["id"][0], (1, 2, 3))
    (photos / samples["id"][1]).unlink()
    after = controls.pixels(samples)
    assert np.isnan(after[:2]).all() and (after[2:] == before[2:]).all()


def test_an_untrained_backbone_sees_the_same_images(tmp_path: Path, photos: Path) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "real"))
    extract(list_source(str(photos)), store, [Request.parse("tiny")], compile="off")
    samples, view = store.snapshot().samples.to_pandas(), store.pick_view(None)
    (photos / samples["id"][3]).unlink()
    found = controls.untrained(samples, view, "cpu")
    assert found.shape == (24, view.dim) and np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, 0)).all()
    trained = store.load()[1]
    assert not np.allclose(np.delete(found, 3, 0), np.delete(trained, 3, 0))
    assert len(controls.bounded(samples)) == 24
    assert pa.table(store.snapshot().samples).num_rows == 24
