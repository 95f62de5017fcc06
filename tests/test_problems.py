"""Label errors, odd images and doubles: what was planted is found."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from conftest import answer, draw
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import explore, problems
from pipeline.duplicates import Pairs
from pipeline.metrics import Predictions
from pipeline.train import train


def listing(count: int) -> pd.DataFrame:
    names = [f"{number:03d}" for number in range(count)]
    return pd.DataFrame({"source": "s", "id": names, "uri": names, "sha256": names})


def test_a_label_that_held_out_heads_firmly_deny_comes_first() -> None:
    y = np.arange(60) % 2
    shares = np.where(np.eye(2)[y] == 1, 0.9, 0.1)
    shares[7] = shares[7, ::-1]
    found = Predictions(y, shares.argmax(axis=1), shares, None, np.array(["ant", "bee"]))
    table = problems.label_errors(listing(80), "kind", np.arange(20, 80), found)
    assert table.index[0] == 27 and table["likely_error"].tolist() == [True] + [False] * 59
    first = table.iloc[0]
    assert (first["id"], first["label"], first["predicted"]) == ("027", "bee", "ant") and first["p_label"] < 0.2
    assert table["quality"].between(0, 1).all()


@pytest.mark.parametrize("log", [False, True])
def test_a_quantity_far_from_its_prediction_comes_first(log: bool) -> None:
    random = np.random.default_rng(0)
    y = np.exp(random.normal(size=50)) if log else random.normal(size=50)
    predicted = y * np.exp(0.05 * random.normal(size=50)) if log else y + 0.05 * random.normal(size=50)
    y[3] = y[3] * 9 if log else y[3] + 9
    y[8] = y[8] * 30 if log else y[8] + 30
    for unit in (1, 1e6, 1e-6):
        found = Predictions(unit * y, unit * predicted)
        table = problems.label_errors(listing(50), "price", np.arange(50), found, log)
        assert table.index[:2].tolist() == [8, 3] and table["likely_error"].sum() == 2
        assert 0.1 < table["quality"].median() < 0.9


def test_an_odd_image_comes_first_however_often_it_is_there() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(300, 8)).astype(np.float32)
    X[[40, 41]] = 30
    samples = listing(300)
    samples.loc[41, "sha256"] = samples.loc[40, "sha256"]
    table = problems.outliers(samples, X)
    assert set(table.index[:2]) == {40, 41} and set(table.index[table["outlier"]]) == {40, 41}
    assert len(problems.outliers(samples[:1], X[:1])) == 1


def test_copies_by_their_bytes_come_before_those_by_their_embeddings() -> None:
    samples = listing(6)
    samples.loc[[3, 5], "sha256"] = samples.loc[1, "sha256"]
    pairs = Pairs(np.array([0]), np.array([4]), np.array([0.9], np.float32))
    table = problems.near_duplicates(samples, pairs)
    assert table[["first_id", "second_id"]].to_numpy().tolist() == [["001", "003"], ["001", "005"], ["000", "004"]]
    assert table["kind"].tolist() == ["same bytes", "same bytes", "near"]
    assert len(problems.near_duplicates(listing(2), Pairs.none())) == 0


def test_clusters_are_as_many_as_there_are() -> None:
    random = np.random.default_rng(0)
    X = (10 * np.eye(5, 40)[random.integers(5, size=400)] + random.normal(size=(400, 40))).astype(np.float32)
    label, distance = explore.clustered(X)
    assert label.max() == 4 and (np.diff(np.bincount(label)) <= 0).all() and distance.shape == (400,)
    assert explore.clustered(X, 7)[0].max() == 6
    for few in (X[:1], X[:2], np.repeat(X[:1], 30, axis=0)):
        assert explore.clustered(few)[0].max() <= 1


def test_a_look_at_a_store(photos: Path, tmp_path: Path, permafrost: Callable[..., Any]) -> None:
    draw(photos / "train/red/again.png", (1, 2, 3))
    (photos / "train/blue/same.png").write_bytes((photos / "train/red/00.png").read_bytes())
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    shape = Image.fromarray(noise).resize((8, 6)).resize((80, 60), Image.Resampling.BICUBIC)
    shape.save(photos / "train/green/shape.png")
    ImageOps.mirror(shape).resize((60, 45)).save(photos / "train/green/turned.jpg", quality=95, subsampling=0)
    permafrost("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    (tmp_path / "look").mkdir()
    look = ("explore", tmp_path / "store", "--out", tmp_path / "look", "--mirrored", "--json")
    facts = answer(permafrost(*look))
    assert sum(facts["clusters"]) == facts["samples"] == 28
    assert {path.name for path in (tmp_path / "look").iterdir()} == set(explore.FILES)
    pairs = pd.read_parquet(tmp_path / "look/near_duplicates.parquet").set_index("kind")
    assert set(pairs.loc[["same bytes"], "first_id"]) == {"train/blue/same.png"}
    assert pairs.loc[["mirrored"], ["first_id", "second_id"]].to_numpy().tolist() == [
        ["train/green/shape.png", "train/green/turned.jpg"]
    ]
    assert pd.read_parquet(tmp_path / "look/clusters.parquet")["cluster"].value_counts().tolist() == facts["clusters"]
    assert len(pd.read_parquet(tmp_path / "look/outliers.parquet")) == 28
    # A second look replaces the first, and nothing else.
    permafrost(*look[:-2], "--where", "label = 'red'", "--clusters", 2)
    assert len(pd.read_parquet(tmp_path / "look/outliers.parquet")) == 9
    too_many = permafrost(*look[:-2], "--clusters", 99, code=2)
    assert too_many.stderr.endswith("28 images cannot make 99 clusters; use fewer --clusters\n")
    (tmp_path / "look/thesis.txt").write_text("")
    assert "holds thesis.txt" in permafrost(*look, code=2).stderr


def flipped(testdata: Path, tmp_path: Path, request: Request, seed: int) -> float:
    """Share of a tenth of hymenoptera's labels, flipped, that is in the first 15% of the list."""
    source = testdata / "hymenoptera"
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(source)), store, [request], compile="off")
    samples = store.snapshot().samples.to_pandas()
    samples = samples[samples["status"] == "ok"]
    wrong = np.random.default_rng(seed).permutation(len(samples))[: len(samples) // 10]
    labels = samples["label"].to_numpy(dtype=object)
    labels[wrong] = np.where(labels[wrong] == "ants", "bees", "ants")
    pd.DataFrame({"id": samples["id"], "flipped": labels}).to_csv(tmp_path / "labels.csv", index=False)
    selection = explore.dataset.Selection(labels=str(tmp_path / "labels.csv"))
    train(store, "flipped", tmp_path / "bundle", selection=selection, with_images=False)
    listed = pd.read_parquet(tmp_path / "bundle/label_errors.parquet")["id"]
    first = set(listed.head(round(0.15 * len(samples))))
    return float(np.mean([id in first for id in samples["id"].iloc[wrong]]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "squeezenet1_1"])
def test_flipped_labels_are_found(testdata: Path, tmp_path: Path, backbone: str, seed: int) -> None:
    request = Request.parse(backbone, str(testdata / f"weights/{backbone}-imagenet.pth"))
    found = flipped(testdata, tmp_path, request, seed)
    print(backbone, seed, f"{found:.2f}")
    assert found >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["tiny", "mobilenet_v2"])
def test_planted_doubles_are_found(
    testdata: Path, tmp_path: Path, backbone: str, permafrost: Callable[..., Any]
) -> None:
    random, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    kinds = {"coded": "near", "small": "near", "turned": "mirrored"}
    for number, path in enumerate(sorted((testdata / "hymenoptera").rglob("*.jpg"))):
        (folder / f"{number:03d}.jpg").write_bytes(path.read_bytes())
        image, share = Image.open(path).convert("RGB"), random.uniform(0.5, 0.9)
        sides = round(image.width * share), round(image.height * share)
        images = {"coded": image, "small": image.resize(sides), "turned": ImageOps.mirror(image).resize(sides)}
        name = list(kinds)[number % 6] if number % 6 < 3 else None
        if name:
            images[name].save(buffer := io.BytesIO(), "JPEG", quality=int(random.integers(60, 96)))
            (folder / f"{number:03d}-{name}.jpg").write_bytes(buffer.getvalue())
    weights = [] if backbone == "tiny" else ["--weights", testdata / f"weights/{backbone}-imagenet.pth"]
    store = ("--store", tmp_path / "store", "--backbone", backbone, "--compile", "off")
    permafrost("extract", folder, *store, *weights)
    permafrost("explore", tmp_path / "store", "--out", tmp_path / "look", "--mirrored", "--no-images")
    pairs = pd.read_parquet(tmp_path / "look/near_duplicates.parquet")
    for kind in ("near", "mirrored"):
        of = pairs[pairs["kind"] == kind]
        found = {(a[:3], max(a, b, key=len)[:-4]) for a, b in of[["first_id", "second_id"]].to_numpy()}
        planted = {
            (path.stem[:3], path.stem) for path in folder.glob("*-*.jpg") if kinds[path.stem.split("-")[1]] == kind
        }
        precision, recall = len(found & planted) / len(of), len(found & planted) / len(planted)
        print(backbone, kind, f"precision {precision:.3f}, recall {recall:.3f} of {len(planted)}")
        assert precision >= 0.95 and recall >= 0.95
