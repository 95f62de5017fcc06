"""What is recorded is enough: the same scores from the same snapshot, the same predictions in another environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest

from conftest import draw
from features.store import FeatureStore
from pipeline import bundle

ROOT = Path(__file__).parents[1]


def scores(facts: dict[str, Any]) -> dict[str, Any]:
    """Every number that `bundle.json` has of the targets, by where it stands there; seconds vary."""
    found = pd.json_normalize([{**target, "seconds": None} for target in facts["targets"]]).T[0]
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "asked",
    [
        ["--folds", "3"],
        pytest.param(
            ["--folds", "2", "--head", "auto", "--balanced", "--split", "split", "--where", "label <> 'it''s'"],
            marks=pytest.mark.slow,
        ),
        ["--folds", "2", "--head", "logreg", "--tune", "--calibrate", "--split-near-duplicates"],
        ["--folds", "3", "--controls", "--head", "random_forest", "--no-images"],
        ["--folds", "2", "--labels", "labels.csv", "--on", "id", "--log", "--target", "sum", "--max-unmatched", "5"],
    ],
    ids=lambda asked: " ".join(asked[2:4]),
)
def test_the_recorded_command_gives_the_recorded_scores(
    asked: list[str], photos: Path, tmp_path: Path, permafrost: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    permafrost("extract", photos, "--store", "a store", "--backbone", "tiny")
    listing = FeatureStore.open("a store").snapshot().samples.to_pandas()
    table = pd.DataFrame({"id": listing["id"], "sum": 1.0 + np.arange(len(listing)) % 7})
    table.to_csv("labels.csv", index=False)
    target = [] if "--target" in asked else ["--target", "label"]
    permafrost("train", "a store", *target, *asked, "--out", "first")
    # The store goes on.
    draw(photos / "train/red/more.png", (250, 1, 1))
    (photos / "train/blue").rename(photos / "train/violet")
    permafrost("extract", photos, "--store", "a store", "--backbone", "tiny")
    if "--controls" in asked:
        (photos / "train/violet").rename(photos / "train/blue")
    told = json.loads(Path("first/report.json").read_text())["command"]
    assert told.startswith("permafrost train") and told.endswith("--out BUNDLE")
    permafrost(*shlex.split(told)[1:-1], "second")
    first, second = (json.loads(Path(name, "bundle.json").read_text()) for name in ("first", "second"))
    ours, theirs = scores(first), scores(second)
    assert {name: (value, theirs[name]) for name, value in ours.items() if theirs[name] != value} == {}
    assert first["snapshot"] == second["snapshot"]
    assert FeatureStore.open("a store").snapshot().number == 2
    nowhere = permafrost("train", "a store", "--target", "label", "--snapshot", 9, "--out", "third", code=5)
    assert "has no snapshot 9" in nowhere.stderr and not Path("third").exists()


def test_a_store_elsewhere_is_named_so_that_it_is_found_again(
    photos: Path, tmp_path: Path, permafrost: Callable[..., Any], bucket: str
) -> None:
    permafrost("extract", photos, "--store", f"{bucket}/st", "--backbone", "tiny")
    permafrost("train", f"{bucket}/st", "--target", "label", "--folds", 2, "--out", tmp_path / "first")
    told = json.loads((tmp_path / "first/report.json").read_text())["command"]
    assert f" {bucket}/st " in told
    permafrost(*shlex.split(told)[1:-1], tmp_path / "second")


def test_heads_for_plain_scikit_learn(photos: Path, tmp_path: Path, permafrost: Callable[..., Any]) -> None:
    permafrost("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    out = tmp_path / "bundle"
    train = ("train", tmp_path / "store", "--target", "label", "--folds", 2, "--split-near-duplicates", "--out", out)
    permafrost(*train)
    assert not (out / "head.joblib").exists()
    permafrost(*train, "--joblib")
    X = FeatureStore.open(str(tmp_path / "store")).load()[1]
    head = joblib.load(out / "head.joblib")
    assert (head.predict(X) == bundle.load(out).heads["label"].predict(X)).all()
    permafrost(*train, "--target", "split", "--joblib")
    assert set(joblib.load(out / "head.joblib")) == {"label", "split"}


@pytest.mark.slow
def test_a_fresh_environment_predicts_the_same(photos: Path, tmp_path: Path, process: Callable[..., Any]) -> None:
    store = tmp_path / "store"
    process("extract", photos, "--store", store, "--backbone", "tiny")
    trained = ("--target", "label", "--folds", 2, "--calibrate", "--split-near-duplicates")
    process("train", store, *trained, "--out", tmp_path / "bundle")
    process("predict", tmp_path / "bundle", photos, "--out", tmp_path / "here.parquet")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "bundle", elsewhere / "moved")
    shutil.copytree(photos, elsewhere / "photos")
    shutil.rmtree(store)
    shutil.rmtree(photos)
    subprocess.run([sys.executable, "-m", "venv", elsewhere / "venv"], check=True)
    pip = [elsewhere / "venv/bin/pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-r", ROOT / "requirements.lock"], check=True)
    # As a wheel, so that what is not packed is not there.
    shutil.copytree(ROOT, elsewhere / "project", ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "tests"))
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", elsewhere / "project"], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [elsewhere / "venv/bin/permafrost", "predict", "moved", "photos", "--out", "there.parquet"]
    subprocess.run(command, check=True, cwd=elsewhere, env=environment)
    subprocess.run(
        [elsewhere / "venv/bin/permafrost", "demo"], check=True, cwd=elsewhere, env=environment, capture_output=True
    )
    assert (elsewhere / "permafrost-demo/bundle/report.html").is_file()
    here, there = (pd.read_parquet(path) for path in (tmp_path / "here.parquet", elsewhere / "there.parquet"))
    assert here["id"].tolist() == there["id"].tolist()
    numbers = [name for name in here if name.startswith("p_") or name == "oddity"]
    assert len(numbers) == 4 and np.abs(here[numbers] - there[numbers]).to_numpy().max() <= 1e-6
    assert (here["prediction"] == there["prediction"]).all()
    assert [list(each) for each in here["set"]] == [list(each) for each in there["set"]]
