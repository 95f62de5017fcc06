"""Training on embeddings that are read block by block: it gives what memory gives, in bounds, and leaves nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss

from conftest import answer, peak_memory, predicted
from features import parts, samples
from features.errors import DataError
from features.store import FeatureStore
from features.views import Request, View
from pipeline import blocks, bundle, dataset, evaluate, folds, heads, streaming, tuning
from pipeline.blocks import Blocks
from pipeline.dataset import Selection, load
from pipeline.folds import Examples, fold
from pipeline.targets import Task
from pipeline.train import train
from pipeline.tuning import Recipe

DIM = 6
ROWS = 600
VIEW = View("v", {}, DIM, Request("none", "V1"))
NO_IMAGES: dict[str, Any] = {"with_images": False, "folds": 3}
Permafrost = Callable[..., subprocess.CompletedProcess[str]]


def drawn(place: Path, rows: int = ROWS, view: View = VIEW) -> FeatureStore:
    """A store of three classes, sorted; every tenth sample is a copy of the one before it, and the last has nothing."""
    store, random = FeatureStore.open_or_new(str(place)), np.random.default_rng(0)
    store.add_view(view)
    label = np.arange(rows) * 3 // rows
    X = random.normal(size=(rows, view.dim)).astype(np.float32)
    X[np.arange(rows), label] += 2
    same = np.where(np.arange(rows) % 10 == 9, np.arange(rows) - 1, np.arange(rows)).tolist()
    keys = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows)]
    for start in range(0, rows - 1, 70):
        some = slice(start, min(start + 70, rows - 1))
        parts.write(store.root, view, keys[some], X[some], {})
    known: dict[str, Any] = {name: pa.nulls(rows) for name in samples.SCHEMA.names}
    known |= {"source": ["drawn"] * rows, "id": [f"{row:06d}" for row in range(rows)], "status": ["ok"] * rows}
    known |= {"uri": [f"/none/{row}" for row in range(rows)], "sha256": [keys[row] for row in same]}
    known |= {"bytes": [100 + row for row in range(rows)], "width": [8] * rows, "height": [8] * rows}
    known |= {"format": ["PNG"] * rows, "label": [f"class {number}" for number in label]}
    known |= {"size": 1000 + 10 * X[:, 0].astype(float), "patient": [row // 4 for row in range(rows)]}
    store.publish("drawn", pa.table(known), "2025-01-01T00:00:00+00:00")
    return store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    # Ten blocks of sixty rows.
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 60 * DIM * 4)
    # Passes over so few rows take longer than they teach.
    monkeypatch.setattr(streaming, "STEPS", 20 * ROWS)
    return drawn(tmp_path / "store")


def both(store: FeatureStore, target: str) -> tuple[Blocks, Examples]:
    """The matrix in a file, and the same examples in memory."""
    loose = Selection(near_duplicates=False)
    known = load(store, [VIEW], store.snapshot(), [target], loose)
    data = load(store, [VIEW], store.snapshot(), [target], loose, lambda rows, dim: True, Path(store.root.path).parent)
    streamed, X = data.embeddings["v"], known.embeddings["v"]
    assert isinstance(streamed, Blocks) and isinstance(X, np.ndarray)
    task: Task = "multiclass" if target == "label" else "regression"
    y = known.samples[target].to_numpy(np.str_ if target == "label" else float)
    return streamed, Examples(X, y, task, data.groups.of)


def test_blocks_hold_every_row_once_and_classes_mixed(store: FeatureStore) -> None:
    streamed, known = both(store, "label")
    assert len(streamed) == len(known) == ROWS and np.array_equal(np.asarray(streamed), known.X)
    told = list(streamed)
    assert len(told) == 10 and sorted(np.concatenate([rows for rows, _ in told])) == list(range(ROWS))
    assert all(len(set(known.y[rows])) == 3 for rows, _ in told)
    some = np.random.default_rng(1).permutation(ROWS)[:50]
    assert np.array_equal(np.asarray(streamed[some]), np.asarray(known.X)[some])
    assert np.array_equal(np.asarray(streamed[some][np.arange(50) % 2 == 0]), np.asarray(known.X)[some[::2]])


def test_blocks_do_not_depend_on_the_parts(store: FeatureStore, tmp_path: Path) -> None:
    before, _ = both(store, "label")
    _, vectors = parts.gather(store.root, VIEW, store.snapshot().samples["sha256"])
    keys = store.snapshot().samples["sha256"].to_pylist()
    for name in parts.names(store.root, VIEW):
        Path(store.root.path, "embeddings/v", name).unlink()
    for row in np.random.default_rng(0).permutation(ROWS)[::-1]:
        parts.write(store.root, VIEW, [keys[row]], vectors[[row]], {})
    after, _ = both(store, "label")
    for (rows, X), (others, Y) in zip(before, after, strict=True):
        assert np.array_equal(rows, others) and np.array_equal(X, Y)


@pytest.mark.parametrize("balanced", [False, True], ids=["as they are", "balanced"])
def test_a_head_learns_from_blocks_what_it_learns_in_memory(store: FeatureStore, balanced: bool) -> None:
    streamed, known = both(store, "label")
    few = np.flatnonzero((known.y != "class 0") | (np.arange(ROWS) % 10 == 0))
    streamed, known = streamed[few], known.take(few)
    recipe = Recipe("multiclass", "sgd", balanced=balanced)
    ours = tuning.fit(recipe, dataclasses.replace(known, X=streamed)).estimator
    theirs = tuning.fit(recipe, known).estimator
    assert ours.classes_.tolist() == theirs.classes_.tolist() == ["class 0", "class 1", "class 2"]
    assert np.abs(ours.predict_proba(known.X) - theirs.predict_proba(known.X)).mean() < 0.02
    assert (ours.predict(known.X) == theirs.predict(known.X)).mean() > 0.97
    assert log_loss(known.y, ours.predict_proba(known.X)) < 1.05 * log_loss(known.y, theirs.predict_proba(known.X))
    assert ours["head"].get_params() == theirs["head"].get_params()
    said, classes = evaluate.predictions(ours, known, ours.classes_), ours.classes_
    again = evaluate.predictions(ours, dataclasses.replace(known, X=streamed), classes)
    assert np.array_equal(said.predicted, again.predicted) and np.allclose(said.shares, again.shares, atol=1e-6)  # type: ignore[arg-type]


def test_a_rare_class_of_two_is_learnt_from_blocks(store: FeatureStore) -> None:
    streamed, known = both(store, "label")
    rare = np.flatnonzero((known.y == "class 1") | ((known.y == "class 0") & (np.arange(ROWS) % 10 == 0)))
    streamed, known = streamed[rare], dataclasses.replace(known.take(rare), task="binary")
    recipe = Recipe("binary", "sgd")
    ours = tuning.fit(recipe, dataclasses.replace(known, X=streamed)).estimator
    theirs = tuning.fit(recipe, known).estimator
    assert ours.classes_.tolist() == ["class 0", "class 1"] and ours["head"].coef_.shape == (1, DIM)
    # An intercept that is forgotten at every block is near zero.
    assert abs(theirs["head"].intercept_[0]) > 1
    assert np.allclose(ours["head"].intercept_, theirs["head"].intercept_, rtol=0.2)
    assert log_loss(known.y, ours.predict_proba(known.X)) < 1.05 * log_loss(known.y, theirs.predict_proba(known.X))


@pytest.mark.parametrize("log", [False, True], ids=["as it is", "log"])
def test_quantities_are_learnt_from_blocks(store: FeatureStore, log: bool) -> None:
    streamed, known = both(store, "size")
    recipe = Recipe("regression", "sgd", log=log)
    ours = tuning.fit(recipe, dataclasses.replace(known, X=streamed)).estimator.predict(known.X)
    theirs = tuning.fit(recipe, known).estimator.predict(known.X)
    # Of six numbers the length of a row tells much, and rows of length one have lost it.
    assert np.corrcoef(ours, known.y)[0, 1] > 0.85 and np.corrcoef(ours, theirs)[0, 1] > 0.999


def test_one_command_streams_to_a_bundle_that_predicts(
    store: FeatureStore, tmp_path: Path, permafrost: Permafrost
) -> None:
    out = tmp_path / "bundle"
    where = ["--test-where", "id >= '000590'", "--streaming", "--no-images", "--folds", 3, "--groups", "patient"]
    facts = answer(permafrost("train", store.root.path, "--target", "label", "--out", out, *where, "--json"))
    (target,) = facts["targets"]
    assert facts["settings"]["streaming"] and target["head"] == "sgd"
    assert facts["rows"]["train"] == 590 and facts["rows"]["test"] == 10 and target["rows"]["independent"] == 148
    assert target["cross_validation"]["head"]["accuracy"]["value"] > 0.7 and target["conformal"]["coverage"] > 0.8
    assert {"dummy", "file"} <= target["cross_validation"].keys() and len(target["learning_curve"]) == 1
    report = json.loads((out / "report.json").read_text())
    assert "--streaming" in report["command"] and any(
        "no near duplicates were sought" in note for note in report["notes"]
    )
    said = predicted(bundle.load(out), store, tmp_path / "p.parquet").set_index("id")
    labels = store.snapshot().samples.to_pandas().set_index("id")["label"]
    assert (said["prediction"] == labels)[said["status"] == "ok"].mean() > 0.7


@pytest.mark.slow
def test_blocks_give_the_same_scores_again(store: FeatureStore, tmp_path: Path) -> None:
    again = train(store, "label", tmp_path / "again", stream=True, **NO_IMAGES)["targets"]
    once = train(store, "label", tmp_path / "once", stream=True, **NO_IMAGES)["targets"]
    assert once[0]["cross_validation"] == again[0]["cross_validation"]


def test_it_streams_by_itself_where_memory_does_not_do(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permafrost: Permafrost
) -> None:
    fits = 2 * streaming.COPIES * 4 * ROWS * DIM
    for memory, streamed in ((fits, False), (fits - 2, True)):
        monkeypatch.setattr(streaming, "memory", lambda memory=memory: memory)
        facts = train(store, "label", tmp_path / "bundle", selection=Selection(near_duplicates=False), **NO_IMAGES)
        assert facts["settings"]["streaming"] == streamed
        assert facts["targets"][0]["head"] == ("sgd" if streamed else "logreg")
    ask = ["train", store.root.path, "--target", "label", "--out", tmp_path / "b", "--no-images", "--folds", 3]
    for option, told in (
        (["--head", "logreg"], "head 'logreg' needs all at once; use --head sgd, or --no-streaming"),
        (["--tune"], "--tune needs all at once; leave it out, or use --no-streaming"),
        (["--calibrate"], "--calibrate needs all at once"),
        (["--controls"], "--controls needs all at once"),
    ):
        said = permafrost(*ask, *option, code=2).stderr
        assert said.count("\n") == 1 and told in said and "600 embeddings of 6 numbers" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "store"]
    permafrost(*ask, "--head", "logreg", "--no-streaming", "--split-near-duplicates")


def test_memory_is_that_of_the_tightest_control_group(tmp_path: Path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "groups/a/b").mkdir(parents=True)
    mine = tmp_path / "mine"
    assert streaming.memory(tmp_path / "groups", mine) == machine
    mine.write_text("0::/a/b\n")
    assert streaming.memory(tmp_path / "groups", mine) == machine
    (tmp_path / "groups/a/memory.max").write_text("1048576\n")
    (tmp_path / "groups/a/b/memory.max").write_text("max\n")
    assert streaming.memory(tmp_path / "groups", mine) == 1048576


def test_very_many_groups_stay_whole_and_classes_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "MOST_WEIGHED", 100)
    random = np.random.default_rng(0)
    groups, y = random.integers(400, size=ROWS), np.arange(ROWS) % 3
    found = fold(Examples(np.zeros((ROWS, 1), np.float32), y, "multiclass", groups), 4)
    assert sorted(np.concatenate([score for _, score in found])) == list(range(ROWS))
    for fit, score in found:
        assert not set(groups[fit]) & set(groups[score]) and sorted([*fit, *score]) == list(range(ROWS))
        assert len(score) > ROWS / 6 and np.bincount(y[score]).min() > ROWS / 25


@pytest.mark.slow
def test_a_disk_without_space_and_a_signal_leave_nothing(tmp_path: Path) -> None:
    view = View("v", {}, 64, Request("none", "V1"))
    store = drawn(tmp_path / "store", 20_000, view)
    command = [sys.executable, "-m", "pipeline.cli", "train", store.root.path, "--target", "label", "--streaming"]
    command += ["--no-images", "--out", str(tmp_path / "bundle")]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert full.returncode == 1 and full.stderr.count("\n") == 1, full.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert running.stderr
    running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode in (143, -signal.SIGTERM)
    time.sleep(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    peaks, dim = [], 512
    for rows in (30_000, 230_000):
        place = tmp_path / str(rows)
        store = drawn(place, rows, View("v", {}, dim, Request("none", "V1")))
        train = ["train", store.root.path, "--target", "label", "--streaming", "--no-images", "--folds", 2]
        peaks.append(peak_memory(*train, "--out", tmp_path / f"b{rows}"))
    # What is known of each sample beside its embedding does.
    assert peaks[1] - peaks[0] < 200_000 * dim * 4 / 2, peaks


def test_what_no_block_can_give_is_refused_before_the_work(store: FeatureStore, tmp_path: Path) -> None:
    for name in heads.HEADS:
        if name != "sgd":
            with pytest.raises(DataError, match="needs all at once"):
                train(store, "label", tmp_path / "bundle", head=name, stream=True, **NO_IMAGES)
    with pytest.raises(DataError, match="needs all at once"):
        train(store, "label", tmp_path / "bundle", head="auto", stream=True, **NO_IMAGES)


def test_what_needs_all_at_once_says_so_where_memory_does_not_do(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permafrost: Permafrost
) -> None:
    monkeypatch.setattr(streaming, "memory", lambda: streaming.COPIES * 4 * ROWS * DIM - 1)
    compare = ["compare", store.root.path, "--target", "label", "--heads", "knn"]
    said = permafrost(*compare, code=2).stderr
    assert said.count("\n") == 1 and "600 embeddings of 6 numbers" in said and "choose fewer with --where" in said
    permafrost(*compare, "--where", "id < '000400'")


def test_a_look_is_at_a_sample_where_memory_does_not_do(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permafrost: Permafrost
) -> None:
    monkeypatch.setattr(dataset, "MOST_SEEN", 200)
    look = ["explore", store.root.path, "--out", tmp_path / "look", "--no-images"]
    assert permafrost(*look).stdout.startswith("600 images in ")
    monkeypatch.setattr(streaming, "memory", lambda: 2 * streaming.COPIES * 4 * (ROWS // 2) * DIM)
    assert permafrost(*look).stdout.startswith("200 of 600 images, drawn at random, in ")
    assert "These are drawn at random from 600" in (tmp_path / "look/report.html").read_text()
    assert pq.read_metadata(tmp_path / "look/clusters.parquet").num_rows == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look", "store"]
