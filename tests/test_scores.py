"""Scores and their intervals: the metrics are scikit-learn's, and the intervals hold the truth as often as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from pipeline import conformal, evaluate, intervals, tuning
from pipeline.folds import Examples, fold
from pipeline.intervals import difference, scores
from pipeline.metrics import BINS, Predictions, measure, per_class, reliability
from pipeline.tuning import Recipe

SETS = 200


def drawn(classes: int, rows: int, seed: int, ties: bool = False) -> Predictions:
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.ones(classes), rows)
    if ties:
        shares = np.round(shares, 1)
        shares[:, 0] += 1 - shares.sum(axis=1)
        shares = np.abs(shares) / np.abs(shares).sum(axis=1, keepdims=True)
    y = random.integers(classes, size=rows)
    y[:classes] = np.arange(classes)
    margins = shares[:, 1] if classes == 2 else None
    return Predictions(y, shares.argmax(axis=1), shares, margins, np.arange(classes))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 7]), st.integers(8, 60), st.integers(0, 999), st.booleans())
def test_metrics_of_classes_are_scikit_learns(classes: int, rows: int, seed: int, ties: bool) -> None:
    said = drawn(classes, rows, seed, ties)
    random = np.random.default_rng(seed)
    weights = random.integers(0, 4, size=(3, rows)).astype(float)
    weights[:, :classes] += 1
    found = measure(said, weights)
    for place, w in enumerate(weights):
        # What was never drawn is not there.
        there = w > 0
        y, predicted, shares, w = said.y[there], said.predicted[there], said.shares[there], w[there]  # type: ignore[index]
        known: dict[str, Any] = {
            "accuracy": metrics.accuracy_score(y, predicted, sample_weight=w),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, predicted, sample_weight=w),
            "f1_macro": metrics.f1_score(y, predicted, average="macro", sample_weight=w),
            "log_loss": metrics.log_loss(y, shares, sample_weight=w, labels=range(classes)),
            "brier": metrics.brier_score_loss(
                y, shares if classes > 2 else shares[:, 1], sample_weight=w, labels=list(range(classes))
            ),
        }
        if classes == 2:
            known |= {
                "roc_auc": metrics.roc_auc_score(y, shares[:, 1], sample_weight=w),
                "average_precision": metrics.average_precision_score(y, shares[:, 1], sample_weight=w),
            }
        for name, value in known.items():
            assert found[name][place] == pytest.approx(value, abs=1e-9), name
    assert found.keys() == known.keys() | {"ece"}


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 60), st.integers(0, 999), st.floats(-1e6, 1e6))
def test_metrics_of_quantities_are_scikit_learns(rows: int, seed: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    y = random.normal(size=rows) + offset
    predicted = y + random.normal(size=rows)
    weights = random.integers(0, 4, size=(3, rows)).astype(float)
    weights[:, :2] += 1
    found = measure(Predictions(y, predicted), weights)
    for place, w in enumerate(weights):
        assert found["r2"][place] == pytest.approx(metrics.r2_score(y, predicted, sample_weight=w), rel=1e-6, abs=1e-6)
        assert found["mae"][place] == pytest.approx(metrics.mean_absolute_error(y, predicted, sample_weight=w))
        rmse = metrics.root_mean_squared_error(y, predicted, sample_weight=w)
        assert found["rmse"][place] == pytest.approx(rmse)
    assert np.isnan(measure(Predictions(y[:1], predicted[:1]), np.ones((1, 1)))["r2"]).all()


def test_the_calibration_error_is_the_gap_that_reliability_shows() -> None:
    said = drawn(5, 3000, 0)
    bins = reliability(said)
    assert sum(row["rows"] for row in bins) == 3000 and len(bins) <= BINS
    gap = sum(row["rows"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / 3000
    assert measure(said, np.ones((1, 3000)))["ece"][0] == pytest.approx(gap)
    report = metrics.classification_report(said.y, said.predicted, output_dict=True)
    for row in per_class(said):
        known = report[str(row["class"])]
        assert row["precision"] == pytest.approx(known["precision"]) and row["recall"] == pytest.approx(known["recall"])
        assert (row["f1"], row["rows"]) == (pytest.approx(known["f1-score"]), known["support"])


def test_copies_are_no_evidence() -> None:
    said = drawn(2, 100, 0)
    alone = scores(said, np.arange(100))["accuracy"]
    times = np.repeat(np.arange(100), 30)
    copied = scores(said.take(times), times)["accuracy"]
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert copied.high - copied.low > 4 * (lambda s: s.high - s.low)(
        scores(said.take(times), np.arange(3000))["accuracy"]
    )


def test_all_right_is_no_certainty() -> None:
    y = np.arange(30) % 2
    right = scores(Predictions(y, y, None, None, np.arange(2)), np.arange(30))["accuracy"]
    assert (right.value, right.low, right.high) == (1, 0.9, 1)
    wrong = scores(Predictions(y, 1 - y, None, None, np.arange(2)), np.arange(30))["accuracy"]
    assert (wrong.value, wrong.low, wrong.high) == (0, 0, pytest.approx(0.1))


def test_the_number_of_resamples_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = drawn(3, 50, 1)
    whole = scores(said, np.arange(50))["f1_macro"]
    monkeypatch.setattr(intervals, "CELLS", 1000)
    assert (scores(said, np.arange(50))["f1_macro"].resampled == whole.resampled).all()


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    y = random.integers(2, size=400)
    good = np.where(random.random(400) < 0.9, y, 1 - y)
    worse = np.where(random.random(400) < 0.05, 1 - good, good)
    found = [
        scores(Predictions(y, said, None, None, np.arange(2)), np.arange(400))["accuracy"] for said in (good, worse)
    ]
    gain = difference(*found, "accuracy")
    assert gain["value"] == pytest.approx(found[0].value - found[1].value)
    assert gain["low"] is not None and gain["high"] is not None
    unpaired = np.hypot(*(score.high - score.low for score in found))
    assert gain["high"] - gain["low"] < 0.7 * unpaired
    assert difference(*found[::-1], "accuracy")["value"] == -gain["value"]


def separated(seed: int, rows: int, dim: int, distance: float) -> Examples:
    """Two normal classes so far apart on the first axis."""
    random = np.random.default_rng(seed)
    y = random.permutation(np.arange(rows) % 2)
    X = random.normal(size=(rows, dim)).astype(np.float32)
    X[:, 0] += distance * (y - 0.5)
    return Examples(X, y, "binary", np.arange(rows))


def true_accuracy(head: Any, distance: float) -> float:
    """Of a linear head, on all there is of `separated`."""
    scale, linear = head["scale"], head["head"]
    weights = linear.coef_[0] / scale.scale_
    offset, length = linear.intercept_[0] - weights @ scale.mean_, np.linalg.norm(weights)
    sides = norm.cdf((weights[0] * distance / 2 + np.array([1, -1]) * offset) / length)
    return float(sides.mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dim", "distance"), [(100, 10, 1.5), (400, 50, 2.0), (200, 200, 2.0), (400, 1280, 4.0)]
)
def test_intervals_hold_the_true_score(rows: int, dim: int, distance: float) -> None:
    inside = 0
    for seed in range(SETS):
        examples = separated(seed, rows, dim, distance)
        said, truth = [], []
        parts = fold(examples, 5)
        for fit, score in parts:
            head = tuning.fit(Recipe("binary", "logreg"), examples.take(fit)).estimator
            said.append(evaluate.predictions(head, examples.take(score), np.arange(2)))
            truth.append(true_accuracy(head, distance))
        held = (
            np.concatenate([score for _, score in parts]),
            np.repeat(np.arange(5), [len(score) for _, score in parts]),
        )
        found = scores(evaluate.joined(said), *held)["accuracy"]
        inside += found.low <= np.mean(truth) <= found.high
    assert 0.9 * SETS <= inside <= 0.99 * SETS, inside


def held_out(examples: Examples, head: str = "logreg") -> evaluate.HeldOut:
    return evaluate.held_out(Recipe(examples.task, head), examples, fold(examples, 5))


@pytest.mark.parametrize("distance", [0.5, 1.5, 4.0])
def test_conformal_sets_hold_the_truth_as_often_as_they_say(distance: float) -> None:
    covered = []
    for seed in range(12):
        examples, new = separated(seed, 300, 5, distance), separated(1000 + seed, 4000, 5, distance)
        misfit = conformal.threshold(held_out(examples).predictions)
        assert misfit is not None
        head = tuning.fit(Recipe("binary", "logreg"), examples).estimator
        inside, sizes = conformal.covered(evaluate.predictions(head, new, np.arange(2)), misfit)
        assert sizes.min() >= 0 and sizes.max() <= 2
        covered.append(inside.mean())
    assert 0.87 <= np.mean(covered) <= 0.93


@pytest.mark.parametrize("log", [False, True])
def test_conformal_ranges_hold_the_truth_as_often_as_they_say(log: bool) -> None:
    def quantities(seed: int, rows: int) -> Examples:
        random = np.random.default_rng(seed)
        X = random.normal(size=(rows, 4)).astype(np.float32)
        y = X[:, 0] + random.normal(size=rows)
        return Examples(X, np.exp(y) if log else y, "regression", np.arange(rows))

    covered = []
    for seed in range(12):
        recipe, examples, new = (
            Recipe("regression", "ridge", log=log),
            quantities(seed, 300),
            quantities(99 + seed, 4000),
        )
        found = evaluate.held_out(recipe, examples, fold(examples, 5))
        judged = conformal.judge(found.predictions, found.fold, log)
        assert judged is not None and judged["level"] == 0.9
        head = tuning.fit(recipe, examples).estimator
        inside, _ = conformal.covered(evaluate.predictions(head, new, None), judged["threshold"], log)
        covered.append(inside.mean())
    assert 0.87 <= np.mean(covered) <= 0.93


def test_conformal_thresholds_are_those_of_mapie() -> None:
    mapie = pytest.importorskip("mapie.classification")
    examples, held, new = (separated(seed, 500, 5, 1.5) for seed in range(3))
    head = LogisticRegression().fit(examples.X, examples.y)
    known = mapie.SplitConformalClassifier(head, confidence_level=0.9, prefit=True, conformity_score="lac")
    _, theirs = known.conformalize(held.X, held.y).predict_set(new.X)
    misfit = conformal.threshold(evaluate.predictions(head, held, np.arange(2)))
    assert misfit is not None
    ours = conformal.sets(head.predict_proba(new.X), misfit)
    assert (ours == theirs[:, :, 0]).mean() > 0.999


def test_too_few_examples_give_no_threshold() -> None:
    assert conformal.threshold(drawn(2, 5, 0)) is None
    assert conformal.judge(drawn(2, 8, 0), np.arange(8) % 2) is None
    none = Predictions(np.arange(20) % 2, np.zeros(20, int), None, None, np.arange(2))
    assert conformal.threshold(none) is None


def shuffled(y: NDArray[Any], seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).permutation(y)


@pytest.mark.parametrize(("head", "tune"), [("logreg", False), ("rbf_svm", True)])
def test_noise_scores_like_chance(head: str, tune: bool) -> None:
    values = []
    for seed in range(6):
        examples = separated(seed, 120, 60, 0)
        recipe = Recipe("binary", head, tune)
        found = evaluate.held_out(recipe, examples, fold(examples, 5)).scores()["accuracy"]
        values.append(found.value)
    assert abs(np.mean(values) - 0.5) < 0.06


def test_few_groups_give_wide_intervals() -> None:
    inside = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        level = np.clip(0.7 + 0.1 * random.normal(size=4), 0, 1)
        right = random.random((4, 40)) < level[:, None]
        said = Predictions(np.ones(160, int), right.ravel().astype(int), None, None, np.arange(2))
        found = scores(said, np.repeat(np.arange(4), 40))["accuracy"]
        inside += found.low <= 0.7 <= found.high
    assert inside >= 53
    lonely = scores(Predictions(np.arange(4) % 2, np.zeros(4, int), None, None, np.arange(2)), np.zeros(4, int))[
        "accuracy"
    ]
    assert np.isnan(lonely.low) and lonely.to_json()["low"] is None


def test_calibration_where_a_fold_lacks_a_class() -> None:
    random = np.random.default_rng(0)
    y = np.r_[np.arange(120) % 2, np.arange(60) % 3] + 5
    X = random.normal(size=(180, 6)).astype(np.float32)
    X[np.arange(180), y - 5] += 2
    data = Examples(X, y, "multiclass", np.arange(180), np.arange(180))
    found = evaluate.held_out(Recipe("multiclass", "logreg", calibrate=True), data, fold(data, 3), curve=True)
    assert found.uncalibrated is not None and found.uncalibrated.shares is not None
    accuracy = scores(found.uncalibrated, found.groups)["accuracy"].value
    assert accuracy == pytest.approx(found.scores()["accuracy"].value, abs=0.1) and accuracy > 0.6


@pytest.mark.parametrize("classes", [2, 4])
def test_a_bag_of_groups_gives_the_intervals_of_all(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, groups = drawn(classes, 6000, 0), np.arange(6000) // 2
    whole = scores(said, groups, np.arange(6000) % 3)
    monkeypatch.setattr(intervals, "MOST_GROUPS", 1000)
    bag = scores(said, groups, np.arange(6000) % 3)
    assert whole.keys() == bag.keys()
    for name, score in whole.items():
        other = bag[name]
        assert (other.value, other.folds) == (score.value, score.folds)
        assert other.high - other.low == pytest.approx(score.high - score.low, rel=0.2), name
    # Not those of a thousand groups, which would be wider by the root of three.
    assert bag["accuracy"].high - bag["accuracy"].low < 1.3 * (whole["accuracy"].high - whole["accuracy"].low)


def test_a_bag_of_groups_knows_a_rare_class(monkeypatch: pytest.MonkeyPatch) -> None:
    random, rows = np.random.default_rng(0), 30_000
    y = np.zeros(rows, np.int64)
    y[random.permutation(rows)[:30]] = 1
    sure = 1 / (1 + np.exp(-(random.normal(size=rows) + 3.5 * y - 3)))
    said = Predictions(y, (sure > 0.5).astype(int), np.stack([1 - sure, sure], 1), sure, np.array(["no", "yes"]))
    monkeypatch.setattr(intervals, "MOST_GROUPS", 30_000)
    whole = scores(said, np.arange(rows))
    monkeypatch.setattr(intervals, "MOST_GROUPS", 1000)
    bag = scores(said, np.arange(rows))
    for name in ("balanced_accuracy", "roc_auc"):
        wide, exact = bag[name].high - bag[name].low, whole[name].high - whole[name].low
        assert bag[name].value == whole[name].value and 0.75 * exact < wide < 1.5 * exact, name
