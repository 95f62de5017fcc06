"""Folds keep together what belongs together, and what is chosen inside a fold is chosen without the rest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import SVC

from features.errors import DataError
from pipeline import evaluate, heads, targets, tuning
from pipeline.folds import Examples, fold, part, within
from pipeline.tuning import Recipe


def examples(rows: int, classes: int = 2, groups: Any = None, seed: int = 0, times: Any = None) -> Examples:
    random = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    X = random.normal(size=(rows, 8)).astype(np.float32)
    X[:, 0] += y
    task: targets.Task = "binary" if classes == 2 else "multiclass"
    return Examples(X, y, task, np.arange(rows) if groups is None else np.asarray(groups), times)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(20, 90), st.integers(1, 6), st.integers(0, 99))
def test_every_row_is_scored_once_and_no_group_is_torn(
    folds: int, classes: int, rows: int, members: int, seed: int
) -> None:
    groups = np.random.default_rng(seed).permutation(np.arange(rows) // members)
    data = examples(rows, classes, groups, seed)
    try:
        found = fold(data, folds)
    except DataError as error:
        assert "members" in str(error) or "member" in str(error) or "too few" in str(error)
        return
    assert sorted(np.concatenate([score for _, score in found])) == list(range(rows))
    for fit, score in found:
        assert not set(groups[fit]) & set(groups[score]) and len(fit) + len(score) == rows


def test_time_is_scored_on_its_future_alone() -> None:
    times = np.repeat(np.arange(20), 4)
    groups = np.arange(80)
    groups[79] = 0  # The last is a copy of the first.
    data = examples(80, groups=groups, times=np.random.default_rng(1).permutation(times))
    scored = []
    for fit, score in fold(data, 4):
        assert data.times is not None and data.times[fit].max() < data.times[score].min()
        assert not set(groups[fit]) & set(groups[score])
        scored += list(score)
    assert len(scored) == len(set(scored)) == 64
    with pytest.raises(DataError, match="too few for 4 folds in time"):
        fold(replace(data, times=np.zeros(80)), 4)


@pytest.mark.parametrize(
    ("data", "folds", "told"),
    [
        (examples(40), 1, "use --folds 2 or more"),
        (examples(40, groups=np.zeros(40)), 2, "1 independent training images are too few for 2 folds"),
        (replace(examples(40), y=np.zeros(40)), 2, "all 40 training samples are of class '0.0'"),
        (
            replace(examples(40), y=np.arange(40) < 3),
            5,
            r"1 of 2 classes have fewer members than the 5 folds: True \(3\)",
        ),
        (examples(40, groups=np.arange(40) * (np.arange(40) % 2)), 3, r"only one member, or copies .*: 0 \(1\)"),
    ],
)
def test_what_cannot_be_folded_is_said(data: Examples, folds: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        fold(data, folds)


def test_folds_inside_a_fold_need_two_classes() -> None:
    data = examples(40, groups=np.arange(40) * (np.arange(40) % 2))
    with pytest.raises(DataError, match="too few independent images to tune or calibrate"):
        within(data)
    with pytest.raises(DataError, match="no two independent training images"):
        within(examples(4, groups=np.zeros(4)))


def test_a_larger_part_holds_the_smaller_and_every_class() -> None:
    data = examples(90, 3, np.arange(90) // 3)
    parts = [part(data, share) for share in (0.05, 0.125, 0.5, 1.0)]
    for small, large in itertools.pairwise(parts):
        assert set(small) < set(large)
    assert len(parts[-1]) == 90 and all(set(data.y[rows]) == {0, 1, 2} for rows in parts)
    assert not set(data.groups[parts[2]]) & set(np.delete(data.groups, parts[2]))


def test_the_search_by_distances_is_scikit_learns_own() -> None:
    data = replace(examples(120, 3, seed=2), X=np.abs(examples(120, 3, seed=2).X))
    recipe = Recipe("multiclass", "rbf_svm", tune=True)
    found = tuning.fit(recipe, tuning.with_distances(recipe, data))
    n = Normalizer().transform(data.X)
    unit = 2 * n.var(axis=0).sum()
    grid = {"svc__C": heads.GRIDS["rbf_svm"]["C"], "svc__gamma": [w / unit for w in heads.GRIDS["rbf_svm"]["width"]]}
    known = GridSearchCV(make_pipeline(Normalizer(), SVC()), grid, cv=within(data)).fit(data.X, data.y)
    by_value = tuning.fit(recipe, data)
    assert found.settings == by_value.settings
    assert found.settings["C"] == known.best_params_["svc__C"]
    assert found.settings["width"] / unit == pytest.approx(known.best_params_["svc__gamma"])
    assert (found.estimator.predict(data.X) == known.predict(data.X)).all()


def test_auto_takes_the_simplest_of_the_best() -> None:
    linear = tuning.fit(Recipe("binary", "auto"), examples(150))
    assert linear.head == "logreg"
    random = np.random.default_rng(0)
    X = random.normal(size=(300, 4)).astype(np.float32)
    ring = Examples(X, np.linalg.norm(X, axis=1) > 1.8, "binary", np.arange(300))
    assert tuning.fit(Recipe("binary", "auto"), ring).head not in ("logreg", "ridge", "linear_svm")
    balanced = tuning.candidates(Recipe("binary", "auto", balanced=True))
    assert "knn" not in balanced and "logreg" in balanced


def test_rare_classes_weigh_as_much_as_frequent_ones() -> None:
    random = np.random.default_rng(0)
    y = np.arange(400) % 20 == 0
    X = random.normal(size=(400, 5)).astype(np.float32)
    X[:, 0] += 1.5 * y
    data = Examples(X, y, "binary", np.arange(400))
    plain, balanced = (
        evaluate.held_out(Recipe("binary", "logreg", balanced=each), data, fold(data, 4)).scores()["balanced_accuracy"]
        for each in (False, True)
    )
    assert balanced.value > plain.value + 0.1


@pytest.mark.parametrize("labels", [[3, 11, 40], ["x", "y", "z"]])
@pytest.mark.parametrize("head", ["logreg", "linear_svm", "rbf_svm"])
def test_calibration_keeps_labels_and_mends_probabilities(labels: list[Any], head: str) -> None:
    data = examples(240, 3, seed=1)
    X = data.X.copy()
    X[np.arange(240), 1 + data.y] += 2.5
    data = replace(data, X=X, y=np.array(labels)[data.y])
    recipe = Recipe("multiclass", head, calibrate=True)
    found = evaluate.held_out(recipe, data, fold(data, 4))
    after = found.scores()
    assert after["accuracy"].value > 0.8 and after["ece"].value < 0.12
    if found.uncalibrated is not None and found.uncalibrated.shares is not None:
        assert after["log_loss"].value < evaluate.scores(found.uncalibrated, found.groups)["log_loss"].value
    assert set(tuning.fit(recipe, data).estimator.predict(X)) == set(labels)
