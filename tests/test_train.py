from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import skops.io
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from conftest import Toy, draw
from features.errors import BundleError, DataError, ViewMismatch
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import bundle, evaluate, heads, predict, report
from pipeline.dataset import Dataset, Task
from pipeline.train import train


@pytest.fixture
def store(tmp_path: Path, photos: Path, toy: Toy) -> FeatureStore:
    opened = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), opened, [toy.request])
    return opened


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", heads.HEADS)
def test_every_head_learns_and_survives_its_bundle(name: str, task: Task, tmp_path: Path) -> None:
    if task not in heads.HEADS[name]:
        with pytest.raises(DataError, match=f"{name}' is not for {task}; use "):
            heads.make(name, task)
        return
    random = np.random.default_rng(0)
    X = random.normal(size=(150, 6)).astype(np.float32)
    y: Any = np.where(X[:, 0] + X[:, 1] > 0, "yes", "no") if task == "classification" else 1000 * (3 + X[:, 0])
    data = Dataset(pd.DataFrame(), X, y, np.arange(150))
    scores = evaluate.cross_validated(heads.make(name, task), data, task, 3)
    measure = "accuracy" if task == "classification" else "r2"
    assert scores["head"][measure]["mean"] > scores["dummy"][measure]["mean"] + 0.08
    fitted = heads.make(name, task).fit(X, y)
    bundle.save(tmp_path / "b", fitted, {}, "")
    assert (bundle.load(tmp_path / "b").head.predict(X) == fitted.predict(X)).all()


def test_one_score_everywhere(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    facts = train(store, "label", out, where="split = 'train'", test_where="split = 'test'", folds=3)
    assert facts == json.loads((out / "bundle.json").read_text())
    assert facts["rows"]["train"] == 18 and facts["rows"]["test"] == 6
    assert facts["scores"]["test"]["head"]["accuracy"] == 1.0
    assert facts["scores"]["test"]["dummy"]["accuracy"] == pytest.approx(1 / 3)
    written = (out / "report.md").read_text()
    assert "| accuracy, test | 1.0000 | 0.3333 |" in written
    for cells in report.score_rows(facts):
        assert f"| {' | '.join(cells)} |" in written
    assert facts["classes"] == ["blue", "green", "red"]
    assert (Path(store.root.path) / "snapshots/000001.pin").is_file()
    assert facts["snapshot"] == {"number": 1, "digest": store.snapshot(1).digest, "pinned": True}


def test_predictions_are_those_that_were_scored(store: FeatureStore, tmp_path: Path, photos: Path, toy: Toy) -> None:
    train(store, "label", tmp_path / "bundle", where="split = 'train'", folds=3)
    trained = bundle.load(tmp_path / "bundle")
    (photos / "test/red/broken.png").write_bytes(b"no image")
    before, listing = toy.embedded, store.snapshot()
    draw(photos / "test/red/new.png", (230, 30, 30))
    table = predict.predict_source(trained, list_source(str(photos / "test")), store=store).to_pandas().set_index("id")
    assert toy.embedded == before + 1
    assert store.snapshot().digest == listing.digest and not store.root.names("pending")
    assert len(table) == 8
    assert table.loc["red/broken.png", "error"].startswith("not_an_image: ")
    read = table.drop(index="red/broken.png")
    assert (read["prediction"] == read.index.str.split("/").str[0]).all()
    assert np.allclose(read[["p_blue", "p_green", "p_red"]].sum(axis=1), 1)
    assert table.loc["red/broken.png", ["prediction", "p_red"]].isna().all()
    alone = predict.predict_source(trained, list_source(str(photos / "test"))).to_pandas().set_index("id")
    assert alone["prediction"].equals(table["prediction"])
    stored = predict.predict_store(trained, store).to_pandas()
    assert len(stored) == 24 and (stored["prediction"] == stored["id"].str.split("/").str[1]).all()


def test_predictions_exist_where_nothing_could_be_read(store: FeatureStore, tmp_path: Path) -> None:
    train(store, "label", tmp_path / "bundle", folds=3)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"")
    table = predict.predict_source(bundle.load(tmp_path / "bundle"), list_source(str(tmp_path / "bad")))
    assert table["prediction"].to_pylist() == [None] and table["error"].to_pylist() == ["empty: the file has no bytes"]
    predict.write(table, tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").equals(table)
    assert sorted(path.name for path in tmp_path.glob("*p.parquet*")) == ["p.parquet"]


def test_other_weights_are_refused(store: FeatureStore, tmp_path: Path, photos: Path, toy: Toy) -> None:
    train(store, "label", tmp_path / "bundle", folds=3)
    trained = bundle.load(tmp_path / "bundle")
    with pytest.raises(ViewMismatch, match="weights is 'V1', asked for 'V2'"):
        predict.predict_source(trained, list_source(str(photos)), weights="V2")
    other = FeatureStore.open_or_new(str(tmp_path / "other"))
    extract(list_source(str(photos)), other, [Request("toy", "V2")], view=trained.view.name)
    with pytest.raises(ViewMismatch, match="weights is 'V2', asked for 'V1'"):
        predict.predict_store(trained, other)
    with pytest.raises(ViewMismatch, match="weights is 'V1', asked for 'V2'"):
        predict.predict_source(trained, list_source(str(photos)), store=other)


def test_copies_share_a_fold(photos: Path, tmp_path: Path, toy: Toy) -> None:
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        (path.parent / f"copy-{number}.png").write_bytes(path.read_bytes())
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    facts = train(store, "label", tmp_path / "bundle", test_where="id = 'test/red/18.png'")
    assert facts["rows"]["train_copies"] == 23 and facts["rows"]["test_copies"] == 1
    said = (tmp_path / "bundle/report.md").read_text()
    assert "copies share a fold" in said and "the test score flatters" in said
    data = Dataset(
        pd.DataFrame(), np.zeros((40, 1), np.float32), np.tile(["a", "b"], 20), np.repeat(np.arange(20), 2) // 2
    )
    for fit, score in evaluate.fold(data, "classification", 4):
        assert not set(data.groups[fit]) & set(data.groups[score])
    with pytest.raises(DataError, match=r"fewer members than the 4 folds: b \(1\)"):
        groups = np.where(np.arange(40) < 20, np.arange(40), 99)
        evaluate.fold(Dataset(pd.DataFrame(), data.X, np.repeat(["a", "b"], 20), groups), "classification", 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folds": 9}, r"3 of 3 classes have fewer members than the 9 folds: blue \(8\)"),
        ({"folds": 1}, "use --folds 2 or more"),
        ({"where": "label = 'red'"}, "all 8 training samples are of class 'red'"),
        ({"head": "perceptron"}, "use logreg, "),
        ({"task": "regression"}, "'label' holds 'blue', which is no quantity"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(
    store: FeatureStore, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        train(store, "label", tmp_path / "bundle", **options)
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]


def test_a_bundle_replaces_only_a_bundle(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(DataError, match="is no bundle"):
        train(store, "label", tmp_path / "precious", folds=3)
    train(store, "label", tmp_path / "bundle", folds=3)
    (tmp_path / "bundle/thesis.txt").write_text("")
    with pytest.raises(DataError, match=r"holds thesis\.txt beside a bundle"):
        train(store, "label", tmp_path / "bundle", folds=3)
    (tmp_path / "bundle/thesis.txt").unlink()
    facts = train(store, "label", tmp_path / "bundle", folds=3, head="knn")
    assert bundle.load(tmp_path / "bundle").facts == facts and facts["head"] == "knn"
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["bundle.json", "head.skops", "report.md"]


def test_an_old_bundle_outlasts_a_new_one_that_cannot_be_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bundle.save(tmp_path / "b", heads.make("knn", "regression"), {"target": "old"}, "")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        bundle.save(tmp_path / "b", heads.make("knn", "regression"), {"target": "new"}, "")
    assert bundle.load(tmp_path / "b").facts == old
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "foreign",
    [
        FunctionTransformer(np.sqrt),
        Pipeline([("pca", PCA()), ("head", heads.make("tree", "regression"))]),
        PCA(),
        print,
    ],
    ids=["function", "nested", "untypical estimator", "builtin"],
)
def test_a_head_of_any_other_type_is_refused_by_name(foreign: Any, tmp_path: Path) -> None:
    bundle.save(tmp_path / "b", foreign, {}, "")
    with pytest.raises(BundleError, match="which no bundle of permafrost's holds"):
        bundle.load(tmp_path / "b")


def test_a_type_hidden_in_a_trusted_head_never_runs(tmp_path: Path) -> None:
    sound = skops.io.dumps(heads.make("logreg", "classification").fit([[0.0], [1.0]], ["a", "b"]))
    hidden = {
        "__class__": "system",
        "__module__": "os",
        "__loader__": "FunctionNode",
        "content": {"module_path": "os", "function": "system"},
    }
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(files["schema.json"])
    schema["content"]["content"]["hidden"] = hidden
    files["schema.json"] = json.dumps(schema).encode()
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(BundleError, match=r"holds a os\.system"):
        bundle.audit(changed.getvalue(), tmp_path)


def test_a_changed_incomplete_or_newer_bundle_is_refused(tmp_path: Path) -> None:
    def fresh() -> Path:
        bundle.save(tmp_path / "b", heads.make("knn", "regression"), {}, "report")
        return tmp_path / "b"

    with pytest.raises(BundleError, match=r"it has no bundle\.json"):
        bundle.load(tmp_path)
    (fresh() / "head.skops").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"head\.skops is not the file that was saved"):
        bundle.load(tmp_path / "b")
    (fresh() / "report.md").unlink()
    with pytest.raises(BundleError, match=r"incomplete: it has no report\.md"):
        bundle.load(tmp_path / "b")
    for change in ({"target": "other"}, {"format": "1"}, {"files": []}, {"files": {"../secret": "0"}}):
        facts = json.loads((fresh() / "bundle.json").read_text()) | change
        (tmp_path / "b/bundle.json").write_text(json.dumps(facts))
        with pytest.raises(BundleError):
            bundle.load(tmp_path / "b")
    newer = json.loads((fresh() / "bundle.json").read_text()) | {"format": bundle.FORMAT + 1}
    (tmp_path / "b/bundle.json").write_text(json.dumps(newer))
    with pytest.raises(BundleError, match="has format 2, this permafrost reads up to 1"):
        bundle.load(tmp_path / "b")
