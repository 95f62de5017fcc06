from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundles import facts_of, fitted_head
from conftest import SECRET, Toy, predicted
from features import tables
from features.errors import DataError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from pipeline import bundle, evaluate, heads, report, targets, tuning
from pipeline.dataset import Selection
from pipeline.folds import Examples, fold
from pipeline.intervals import scores
from pipeline.targets import Task
from pipeline.train import train
from pipeline.tuning import Recipe

# Embeddings of three numbers are near duplicates of each other soon.
PAGES = (
    "report.html",
    "report.json",
    "MODEL_CARD.md",
    "label_errors.parquet",
    "outliers.parquet",
    "near_duplicates.parquet",
)
LOOSE = Selection(near_duplicates=False)
TRAINED = Selection(where="split = 'train'", near_duplicates=False)
APART = Selection(split="split", near_duplicates=False)


@pytest.fixture
def store(tmp_path: Path, photos: Path, toy: Toy) -> FeatureStore:
    opened = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), opened, [toy.request])
    return opened


SLOW = ("random_forest", "hist_gradient_boosting")


@pytest.mark.parametrize("tune", [False, True], ids=["as it is", "tuned"])
@pytest.mark.parametrize("task", ["binary", "regression"])
@pytest.mark.parametrize("name", heads.HEADS)
def test_every_head_learns_and_survives_its_bundle(name: str, task: Task, tune: bool, tmp_path: Path) -> None:
    if tune and name in SLOW:
        pytest.skip("its search takes long, and is that of the others")
    if name not in heads.names_for(task):
        with pytest.raises(DataError, match=f"{name}' is not for {targets.kind(task)}; use "):
            heads.make(name, task)
        return
    random = np.random.default_rng(0)
    X = random.normal(size=(150, 6)).astype(np.float32)
    y: Any = np.where(X[:, 0] + X[:, 1] > 0, "yes", "no") if task == "binary" else 1000 * (3 + X[:, 0])
    recipe = Recipe(task, name, tune)
    examples = Examples(X, y, task, np.arange(150))
    parts = fold(examples, 3)
    score = evaluate.held_out(recipe, examples, parts).scores()[recipe.metric].value
    beside = scores(evaluate.held_out_by_dummy(examples, parts), np.arange(150))[recipe.metric].value
    assert score > beside + 0.08
    fitted = tuning.fit(recipe, tuning.with_distances(recipe, examples))
    assert fitted.settings.keys() == (heads.GRIDS[name].keys() if tune else set())
    bundle.save(tmp_path / "b", {"it": fitted.estimator}, facts_of({"it": fitted.estimator}, 6), {})
    assert (bundle.load(tmp_path / "b").heads["it"].predict(X) == fitted.estimator.predict(X)).all()


def test_one_score_everywhere(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    facts = train(store, "label", out, selection=APART, folds=3)
    assert facts == json.loads((out / "bundle.json").read_text())
    assert facts["rows"]["train"] == 18 and facts["rows"]["test"] == 6
    (target,) = facts["targets"]
    assert target["test"]["head"]["accuracy"] == {"value": 1.0, "low": 0.5, "high": 1.0}
    assert target["test"]["dummy"]["accuracy"]["value"] == pytest.approx(1 / 3)
    written = (out / "MODEL_CARD.md").read_text()
    assert "| accuracy, test | 1.0000 [0.500, 1.000] | 0.3333 [" in written
    for cells in report.score_rows(facts, target):
        assert f"| {' | '.join(cells)} |" in written
    assert target["classes"] == ["blue", "green", "red"]
    assert (Path(store.root.path) / "snapshots/000001.pin").is_file()
    assert facts["snapshot"] == {"number": 1, "digest": store.snapshot(1).digest, "pinned": True}


def test_copies_share_a_fold(photos: Path, tmp_path: Path, toy: Toy) -> None:
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        (path.parent / f"copy-{number}.png").write_bytes(path.read_bytes())
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    chosen = Selection(test_where="id = 'test/red/18.png'", near_duplicates=False)
    facts = train(store, "label", tmp_path / "bundle", selection=chosen)
    assert facts["rows"]["copies"] == 24 and facts["rows"]["overlapping"] == ["test/red/18.png"]
    assert facts["targets"][0]["rows"]["independent"] == 24 and facts["targets"][0]["random_split"]["value"] == 1
    said = (tmp_path / "bundle/MODEL_CARD.md").read_text()
    assert "copies share a fold" in said and "the test score flatters" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folds": 9}, r"3 of 3 classes have fewer members than the 9 folds: blue \(8\)"),
        ({"folds": 1}, "use --folds 2 or more"),
        ({"selection": Selection(where="label = 'red'", near_duplicates=False)}, "all 8 training samples are of class"),
        ({"head": "perceptron"}, "use logreg, "),
        ({"head": "knn", "balanced": True}, "knows no class weights"),
        ({"log": True, "task": "classification"}, "'label' has classes; --log is for quantities"),
        ({"task": "regression"}, "'label' holds 'blue', which is no quantity"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(
    store: FeatureStore, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        train(store, "label", tmp_path / "bundle", **{"selection": LOOSE} | options)
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]


def test_a_bundle_replaces_only_a_bundle(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(DataError, match="is no bundle"):
        train(store, "label", tmp_path / "precious", selection=LOOSE, folds=3)
    train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    (tmp_path / "bundle/thesis.txt").write_text("")
    with pytest.raises(DataError, match=r"holds thesis\.txt beside a bundle"):
        train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3)
    (tmp_path / "bundle/thesis.txt").unlink()
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=3, head="knn")
    assert bundle.load(tmp_path / "bundle").facts == facts and facts["targets"][0]["head"] == "knn"
    left = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert left == {"bundle.json", "head.skops", "reference.npy", *PAGES}


def test_an_old_bundle_outlasts_a_new_one_that_cannot_be_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = fitted_head("knn", "regression")
    old = bundle.save(tmp_path / "b", {"old": head}, facts_of({"old": head}), {})
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        bundle.save(tmp_path / "b", {"new": head}, facts_of({"new": head}), {})
    assert bundle.load(tmp_path / "b").facts == old
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def numbers(store: FeatureStore, tmp_path: Path, **columns: Any) -> Selection:
    """Labels of every sample, as columns of a table; the embedding is the mean red, green and blue."""
    ids = sorted(store.snapshot().samples["id"].to_pylist())
    table = pa.table({"id": ids} | {name: [of(key) for key in ids] for name, of in columns.items()})
    pq.write_table(table, tmp_path / "labels.parquet")
    return Selection(labels=str(tmp_path / "labels.parquet"), near_duplicates=False)


def test_several_targets_at_once(store: FeatureStore, tmp_path: Path) -> None:
    chosen = numbers(
        store, tmp_path, colour=lambda key: key.split("/")[1], size=lambda key: len(key.split("/")[1]) + 0.5
    )
    facts = train(store, ["colour", "size"], tmp_path / "bundle", selection=chosen, folds=3)
    assert [(target["name"], target["task"], target["head"]) for target in facts["targets"]] == [
        ("colour", "multiclass", "logreg"),
        ("size", "regression", "ridge"),
    ]
    assert facts["together"] is None and facts["labels"]["rows"] == 24
    table = predicted(bundle.load(tmp_path / "bundle"), store, tmp_path / "p.parquet")
    assert {"prediction_colour", "p_colour_red", "set_colour", "prediction_size", "low_size"} < set(table.columns)
    assert {len(some) for some in table["set_colour"]} <= {0, 1, 2, 3}
    assert (table["prediction_colour"] == table["id"].str.split("/").str[1]).all()


def test_labels_that_come_in_lists(store: FeatureStore, tmp_path: Path) -> None:
    def tags(key: str) -> list[str] | None:
        colour = key.split("/")[1]
        return {"red": ["warm"], "green": [], "blue": ["cold", "dark"]}[colour] if key < "train" else None

    def all_tags(key: str) -> list[str]:
        return {"red": ["warm"], "green": [], "blue": ["cold", "dark"]}[key.split("/")[1]]

    facts = train(
        store, "tags", tmp_path / "bundle", selection=numbers(store, tmp_path, tags=all_tags), folds=3, head="tree"
    )
    assert [target["name"] for target in facts["targets"]] == ["cold", "dark", "warm"]
    assert facts["together"]["mean_average_precision"]["value"] > 0.8
    assert "All 3 labels together: mean average precision" in (tmp_path / "bundle/MODEL_CARD.md").read_text()
    facts = train(
        store, "tags", tmp_path / "bundle", selection=numbers(store, tmp_path, tags=tags), folds=2, head="logreg"
    )
    assert facts["rows"]["left_out"]["unlabelled"] == 18 and facts["rows"]["train"] == 6
    table = predicted(bundle.load(tmp_path / "bundle"), store, tmp_path / "p.parquet")
    assert table["prediction_warm"].notna().all() and len(table) == 24


def test_a_quantity_by_its_logarithm(store: FeatureStore, tmp_path: Path) -> None:
    chosen = numbers(store, tmp_path, size=lambda key: 10.0 ** len(key.split("/")[1]))
    facts = train(store, "size", tmp_path / "bundle", selection=chosen, folds=3, log=True)
    assert facts["targets"][0]["conformal"] is not None
    told = predicted(bundle.load(tmp_path / "bundle"), store, tmp_path / "p.parquet")
    assert (told["low"] > 0).all() and (told["low"] < told["prediction"]).all()
    assert (told["prediction"] < told["high"]).all()
    below = numbers(store, tmp_path, size=lambda key: len(key) - 16.5)
    with pytest.raises(DataError, match=r"'size' goes down to -1.5; --log is for quantities above 0"):
        train(store, "size", tmp_path / "bundle", selection=below, log=True)
    with pytest.raises(DataError, match="--balanced and --calibrate are for classes"):
        train(store, "size", tmp_path / "bundle", selection=chosen, log=True, balanced=True)


def test_a_head_that_needs_more_examples_says_so(store: FeatureStore, tmp_path: Path) -> None:
    few = Selection(where="id < 'test/green/3'", near_duplicates=False)
    with pytest.raises(DataError, match=r"head 'knn' cannot learn from 2 examples: Expected n_neighbors"):
        train(store, "label", tmp_path / "bundle", selection=few, folds=2, head="knn")
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=2, head="knn", tune=True)
    assert facts["targets"][0]["settings"]["n_neighbors"] <= 5


def test_time_is_learnt_from_the_past(store: FeatureStore, tmp_path: Path) -> None:
    when = {key: place for place, key in enumerate(sorted(store.snapshot().samples["id"].to_pylist()))}
    chosen = numbers(store, tmp_path, when=lambda key: None if when[key] == 3 else (when[key] * 7) % 24)
    facts = train(store, "label", tmp_path / "bundle", selection=replace(chosen, time="when"), folds=3)
    assert facts["rows"]["left_out"]["without_time"] == 1 and facts["rows"]["train"] == 23
    with pytest.raises(DataError, match="too few for 30 folds"):
        train(store, "label", tmp_path / "bundle", selection=replace(chosen, time="when"), folds=30)
    tested = replace(chosen, time="when", test_where='"when" in (5, 6)')
    facts = train(store, "label", tmp_path / "bundle", selection=tested, folds=3)
    assert "it is no test of the future" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_no_credentials_of_the_labels_are_kept(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"id": store.snapshot().samples["id"], "kind": store.snapshot().samples["label"]})
    monkeypatch.setattr(tables, "read", lambda location, as_text: table)
    chosen = Selection(labels=f"https://user:{SECRET}@example.com/labels.csv?key={SECRET}", near_duplicates=False)
    train(store, "kind", tmp_path / "bundle", selection=chosen, folds=3)
    for path in (tmp_path / "bundle").iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_controls_are_judged_on_what_can_still_be_read(store: FeatureStore, tmp_path: Path, photos: Path) -> None:
    for path in sorted(photos.rglob("*.png"))[::2]:
        path.unlink()
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=2, with_controls=True)
    gains = facts["targets"][0]["better_than"]
    assert gains["pixels"]["rows"] == gains["untrained"]["rows"] == 12 and gains["pixels"]["head"]["value"] > 0.5
    assert ", on 12 samples, where the head has" in (tmp_path / "bundle/MODEL_CARD.md").read_text()
    for path in photos.rglob("*.png"):
        path.unlink()
    facts = train(store, "label", tmp_path / "bundle", selection=LOOSE, folds=2, with_controls=True)
    assert facts["targets"][0]["better_than"]["pixels"]["refused"] == "no image can be read any more"
    assert "No score for raw pixels: no image can be read" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_few_quantities_are_too_few_to_choose_by(store: FeatureStore, tmp_path: Path) -> None:
    chosen = numbers(store, tmp_path, size=lambda key: len(key) + 0.5)
    few = replace(chosen, where="id < 'test/red'")
    with pytest.raises(DataError, match="examples are too few to tune or choose a head by"):
        train(store, "size", tmp_path / "bundle", selection=few, folds=2, head="auto")
