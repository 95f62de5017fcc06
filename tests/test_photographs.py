"""The main job on real photographs; skipped where there are none."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import answer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_ants_and_bees(permafrost: Run, testdata: Path, tmp_path: Path) -> None:
    photographs, weights = testdata / "hymenoptera", testdata / "weights/mobilenet_v2-imagenet.pth"
    store, bundle, out = tmp_path / "store", tmp_path / "bundle", tmp_path / "p.parquet"
    record = answer(
        permafrost(
            "extract", photographs, "--store", store, "--backbone", "mobilenet_v2", "--weights", weights, "--json"
        )
    )
    files = [path for path in photographs.rglob("*") if path.is_file()]
    assert record["listed"] == len(files) == 398
    rows = pq.read_table(store / "samples.parquet")
    assert set(rows["id"].to_pylist()) == {str(path.relative_to(photographs)) for path in files}
    split = ("--where", "split = 'train'", "--test-where", "split = 'val'")
    facts = answer(
        permafrost("train", store, "--target", "label", *split, "--head", "logreg", "--out", bundle, "--json")
    )
    accuracy = facts["targets"][0]["test"]["head"]["accuracy"]["value"]
    assert accuracy >= 0.94
    assert json.loads((bundle / "bundle.json").read_text())["targets"] == facts["targets"]
    assert f"| accuracy, test | {accuracy:.4f} [" in (bundle / "MODEL_CARD.md").read_text()
    permafrost("predict", bundle, photographs / "val", "--out", out)
    predicted = pq.read_table(out).to_pylist()
    assert len(predicted) == sum(path.is_file() for path in (photographs / "val").rglob("*"))
    right = [row["prediction"] == row["id"].split("/")[0] for row in predicted]
    assert sum(right) / len(right) == accuracy


@pytest.mark.slow
def test_odd_files_are_rows(permafrost: Run, testdata: Path, tmp_path: Path) -> None:
    permafrost("extract", testdata / "odd_images", "--store", tmp_path / "store", "--backbone", "tiny")
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "store/samples.parquet").to_pylist()}
    with (testdata / "odd_images/manifest.csv").open() as file:
        manifest = {row["file"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(manifest)
    # The manifest says ok of two damaged files too, which Pillow only opens once it has failed on them.
    sound = {
        name
        for name, row in manifest.items()
        if row["pil_status"] == "ok" and not row["exif_orientation"].startswith("exif:")
    }
    assert {name for name, row in rows.items() if row["status"] == "ok"} == sound
    assert all((row["error"] is None) == (row["status"] == "ok") for row in rows.values())


@pytest.mark.slow
def test_prices_of_houses_and_counts_of_cells(permafrost: Run, testdata: Path, tmp_path: Path) -> None:
    store, cells, bundle = tmp_path / "store", tmp_path / "cells", tmp_path / "bundle"
    backbone = ("--backbone", "mobilenet_v2", "--weights", testdata / "weights/mobilenet_v2-imagenet.pth")
    permafrost("extract", testdata / "houses/labels.csv", "--store", store, "--image", "frontal", *backbone)
    facts = answer(permafrost("train", store, "--target", "price", "--out", bundle, "--json"))
    (price,) = facts["targets"]
    assert (price["task"], price["head"], price["rows"]["train"]) == ("regression", "ridge", 535)
    permafrost("extract", testdata / "bccd/labels.csv", "--store", cells, *backbone)
    facts = answer(permafrost("train", cells, "--target", "rbc", "--out", bundle, "--json"))
    scores = facts["targets"][0]["cross_validation"]
    assert scores["head"]["mae"]["value"] < scores["dummy"]["mae"]["value"]
    assert scores["head"]["r2"]["value"] > 0.1


@pytest.mark.slow
def test_the_shipped_backbone_beats_the_same_network_untrained(permafrost: Run, testdata: Path, tmp_path: Path) -> None:
    accuracy = {}
    for weights in ("V2", "untrained"):
        for source in ("hymenoptera", "caltech20"):
            store = tmp_path / source
            permafrost("extract", testdata / source, "--store", store, "--backbone", "tiny", "--weights", weights)
            view = f"tiny-{weights}-penultimate"
            facts = answer(
                permafrost("train", store, "--view", view, "--target", "label", "--out", tmp_path / "b", "--json")
            )
            accuracy[source, weights] = facts["targets"][0]["cross_validation"]["head"]["accuracy"]["value"]
    assert accuracy["hymenoptera", "V2"] > accuracy["hymenoptera", "untrained"] + 0.05
    assert accuracy["caltech20", "V2"] > accuracy["caltech20", "untrained"] + 0.05
