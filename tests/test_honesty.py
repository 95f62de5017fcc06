"""On real images: no score flatters, and what may flatter is said."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from conftest import answer
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import evaluate, report
from pipeline.compare import compare
from pipeline.dataset import Selection
from pipeline.duplicates import near_duplicates
from pipeline.folds import Examples, fold
from pipeline.heads import names_for
from pipeline.metrics import measure
from pipeline.train import train
from pipeline.tuning import Recipe

pytestmark = pytest.mark.slow


def request(weights: str, folder: Path) -> Request:
    if weights == "tiny":
        return Request.parse("tiny")
    return Request.parse(weights, str(folder / f"weights/{weights}-imagenet.pth"), precision="fp32")


@pytest.fixture(scope="module")
def stores(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FeatureStore]:
    """A set's store with views by name, made once."""
    known: dict[str, FeatureStore] = {}

    def of(name: str, source: str, *backbones: str, **how: Any) -> FeatureStore:
        if name not in known:
            known[name] = FeatureStore.open_or_new(str(tmp_path_factory.mktemp(name) / "store"))
        for backbone in backbones:
            if backbone not in known[name].views():
                listed = list_source(source if "/" in source else str(testdata / name / source), **how)
                extract(listed, known[name], [request(backbone, testdata)], view=backbone, compile="off")
        return known[name]

    return of


def accuracy(facts: dict[str, Any]) -> float:
    return float(facts["targets"][0]["cross_validation"]["head"]["accuracy"]["value"])


BACKBONES = ["tiny", "mobilenet_v2", "squeezenet1_1"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_near_duplicates_found_by_themselves_give_the_grouped_score(
    backbone: str, stores: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    store = stores("signs", "labels.csv", backbone)
    asked: dict[str, Any] = {"view": backbone, "task": "classification"}
    truth = train(store, "class", tmp_path / "t", selection=Selection(groups="track"), **asked)
    ours = train(store, "class", tmp_path / "o", **asked)
    random = train(store, "class", tmp_path / "r", selection=Selection(near_duplicates=False), **asked)
    assert accuracy(random) > accuracy(truth) + 0.15
    assert abs(accuracy(ours) - accuracy(truth)) <= 0.02, (accuracy(ours), accuracy(truth))
    (target,) = ours["targets"]
    assert target["random_split"]["value"] == pytest.approx(accuracy(random), abs=1e-9)
    assert any("tears groups and near duplicates apart" in line for line in report.findings(target))
    assert any("near duplicates of others; these share a fold" in line for line in report.notes(ours))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_few_photographs_of_one_class_pass_for_copies(backbone: str, stores: Callable[..., FeatureStore]) -> None:
    _, X, samples = stores("caltech20", "", backbone).load(backbone)
    groups, _ = near_duplicates(X)
    sizes = Counter(groups.tolist())
    grouped = [group for group, size in sizes.items() if size > 1]
    # Looked at, these are one picture or one object: 22 to 33 images, mostly drawings of stop signs and of one brain.
    assert sum(sizes[group] for group in grouped) <= 60 and max(sizes.values()) <= 10
    assert all(len(set(samples["label"][groups == group])) == 1 for group in grouped)


@pytest.mark.parametrize("tune", [False, True], ids=["as it is", "tuned"])
def test_permuted_labels_score_like_chance(tune: bool, stores: Callable[..., FeatureStore]) -> None:
    _, X, samples = stores("hymenoptera", "", "mobilenet_v2").load("mobilenet_v2")
    assert X.shape[1] == 1280
    labels = samples["label"].astype(str).to_numpy()
    honest, leaking = [], []
    for seed in range(20):
        y = np.random.default_rng(seed).permutation(labels)
        examples = Examples(X, y, "binary", np.arange(len(y)))
        recipe = Recipe("binary", "logreg", tune)
        honest.append(evaluate.held_out(recipe, examples, fold(examples, 5)).scores()["accuracy"])
        leaking.append(evaluate.held_out(recipe, chosen_by_labels(examples), fold(examples, 5)).scores()["accuracy"])

    def passes(found: list[Any]) -> bool:
        inside = sum(score.low <= 0.5 <= score.high for score in found)
        return inside >= 17 and abs(np.mean([score.value for score in found]) - 0.5) <= 0.02

    assert passes(honest) and not passes(leaking)


def chosen_by_labels(examples: Examples) -> Examples:
    """The leak that is made most often: the best columns are chosen by all labels, before the folds."""
    sides = examples.y == examples.y[0]
    apart = np.abs(examples.X[sides].mean(axis=0) - examples.X[~sides].mean(axis=0)) / examples.X.std(axis=0).clip(1e-6)
    return replace(examples, X=examples.X[:, np.argsort(-apart)[:50]])


def test_calibration_helps(stores: Callable[..., FeatureStore], tmp_path: Path) -> None:
    store = stores("caltech20", "", *BACKBONES)
    for backbone in BACKBONES:
        facts = train(store, "label", tmp_path / "b", view=backbone, calibrate=True)
        (target,) = facts["targets"]
        assert target["cross_validation"]["head"]["ece"]["value"] < target["uncalibrated"]["ece"]["value"]
        assert 0.87 <= target["conformal"]["coverage"] <= 0.93


def test_the_price_of_houses(stores: Callable[..., FeatureStore], tmp_path: Path) -> None:
    store = stores("houses", "labels.csv", "mobilenet_v2", image="frontal", id_column="house")
    facts = train(store, "price", tmp_path / "b", log=True, with_controls=True)
    (target,) = facts["targets"]
    scores = target["cross_validation"]
    assert scores.keys() == {"head", "dummy", "file", "pixels", "untrained"}
    assert scores["head"]["mae"]["value"] < scores["dummy"]["mae"]["value"]
    assert {"r2", "mae", "rmse"} == scores["head"].keys() == scores["dummy"].keys()
    assert target["better_than"].keys() == {"dummy", "file", "pixels", "untrained"}


def test_three_counts_of_blood_cells_at_once(stores: Callable[..., FeatureStore], tmp_path: Path) -> None:
    store = stores("bccd", "labels.csv", "mobilenet_v2")
    facts = train(store, ["rbc", "wbc", "platelets"], tmp_path / "b", task="regression")
    assert [target["name"] for target in facts["targets"]] == ["rbc", "wbc", "platelets"]
    for target in facts["targets"]:
        head, dummy = (target["cross_validation"][who] for who in ("head", "dummy"))
        assert {"r2", "mae", "rmse"} == head.keys() == dummy.keys()
    red = facts["targets"][0]["cross_validation"]
    assert red["head"]["mae"]["value"] < red["dummy"]["mae"]["value"] and red["head"]["r2"]["low"] > 0


def test_digits_on_one_sheet(stores: Callable[..., FeatureStore], tmp_path: Path) -> None:
    frame = composites(tmp_path / "sheets", 400)
    frame.to_parquet(tmp_path / "sheets/labels.parquet")
    store = stores("sheets", str(tmp_path / "sheets/labels.parquet"), "tiny", id_column="file", image="file")
    facts = train(store, "digits", tmp_path / "b")
    assert [target["name"] for target in facts["targets"]] == [str(digit) for digit in range(10)]
    together = facts["together"]["mean_average_precision"]
    each = [target["cross_validation"]["head"]["average_precision"]["value"] for target in facts["targets"]]
    prior = [target["cross_validation"]["dummy"]["average_precision"]["value"] for target in facts["targets"]]
    assert together["value"] == pytest.approx(np.mean(each)) and together["low"] > np.mean(prior) + 0.05


def composites(folder: Path, sheets: int) -> pd.DataFrame:
    """Sheets of four handwritten digits, and which digits are on each."""
    folder.mkdir()
    digits, random, rows = load_digits(), np.random.default_rng(0), []
    for number in range(sheets):
        taken = random.integers(len(digits.target), size=4)
        tiles: list[NDArray[np.float64]] = [255 - digits.images[place] * (255 / 16) for place in taken]
        sheet = np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]]).astype(np.uint8)
        Image.fromarray(sheet).resize((128, 128)).save(folder / f"{number:03d}.png")
        labels = sorted({str(digits.target[place]) for place in taken})
        rows.append({"file": f"{number:03d}.png", "digits": labels})
    return pd.DataFrame(rows)


def test_a_leaderboard_of_real_views(stores: Callable[..., FeatureStore], permafrost: Callable[..., Any]) -> None:
    store = stores("hymenoptera", "", *BACKBONES)
    begun = time.monotonic()
    facts = compare(store, "label")
    print(f"{len(facts['leaderboard'])} heads in {time.monotonic() - begun:.1f} s")
    board = facts["leaderboard"]
    assert len(board) == len(BACKBONES) * len(names_for("binary")) and {row["view"] for row in board} == set(BACKBONES)
    assert board[0]["view"] == "mobilenet_v2" and not board[0]["clear"] and board[-1]["clear"]
    behind = [row["behind"]["value"] for row in board]
    assert behind == sorted(behind) and all(value >= 0 for value in behind)
    told = answer(permafrost("compare", store.root.path, "--target", "label", "--heads", "logreg", "--json"))
    same = {row["view"]: row["scores"] for row in board if row["head"] == "logreg"}
    assert {row["view"]: row["scores"] for row in told["leaderboard"]} == same


def test_ece_is_measured_on_what_is_held_out(stores: Callable[..., FeatureStore]) -> None:
    _, X, samples = stores("caltech20", "", "squeezenet1_1").load("squeezenet1_1")
    examples = Examples(X, samples["label"].astype(str).to_numpy(), "multiclass", np.arange(len(X)))
    found = evaluate.held_out(Recipe("multiclass", "logreg", calibrate=True), examples, fold(examples, 5))
    assert found.uncalibrated is not None
    everything = np.ones((1, len(X)))
    assert measure(found.predictions, everything)["ece"][0] < measure(found.uncalibrated, everything)["ece"][0]
