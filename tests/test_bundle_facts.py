"""Bundles whose parts do not fit each other: refused in one line before compiled code would trust them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import DIM, Head, facts_of, fitted_head, nodes_of, saved, sign, unzipped, zipped
from features.errors import BundleError
from features.views import Request, View
from pipeline import bundle, records

X = np.random.default_rng(5).normal(size=(5, DIM)).astype(np.float32)
VIEW = View("toy", {"backbone": "toy"}, DIM, Request("toy", "V1")).to_json()
TARGET = {"name": "a", "classes": [0, 1, 2]}
NUMBERLESS: list[Any] = [None, "0.5", True, [], {}]


def view(**changes: Any) -> dict[str, Any]:
    return {"view": VIEW | changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": None},
        {"targets": []},
        {"targets": {}},
        {"targets": ["a"]},
        {"targets": [{}]},
        {"targets": [{"name": "a"}]},
        {"targets": [TARGET, TARGET]},
        {"targets": [TARGET | {"name": "b"}]},
        {"targets": [TARGET | {"name": ["a"]}]},
        {"targets": [TARGET | {"classes": None}]},
        {"targets": [TARGET | {"classes": [0, 1]}]},
        {"targets": [TARGET | {"classes": [2, 1, 0]}]},
        {"targets": [TARGET | {"classes": "012"}]},
        {"targets": [TARGET | {"conformal": 1}]},
        {"targets": [TARGET | {"conformal": {}}]},
        *({"targets": [TARGET | {"conformal": {"threshold": value}}]} for value in NUMBERLESS),
        {"view": None},
        {"view": {}},
        view(name="../x"),
        view(spec=[]),
        view(spec={}),
        view(fingerprint=0),
        *(view(dim=value) for value in (0, -1, DIM + 1, float(DIM), "4", None, True, 10**30)),
        view(request={}),
        *(view(request={"backbone": value, "weights": "V1"}) for value in (1, None, [], {})),
        {"format": 1},
        {"format": True},
        {"format": 1, "target": [], "classes": {}},
        {"together": "nested", "files": {}},
    ],
    ids=str,
)
def test_facts_that_do_not_fit_the_heads_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    made = saved(tmp_path / "b", ("logreg", "multiclass", ""))
    assert bundle.load(sign(made, more=None)).facts["more"] is None
    with pytest.raises(BundleError) as refused:
        bundle.load(sign(made, **changes))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("content", ["NaN", "[" * 100_000, "1" * 5000, "null", "[]", '{"files": []}', "\x00", '{"a'])
def test_what_is_no_json_of_a_bundle_is_refused(content: str, tmp_path: Path) -> None:
    made = saved(tmp_path / "b", ("logreg", "multiclass", ""))
    facts = (made / "bundle.json").read_text()
    for text in (content, facts.replace('"report.html"', f'"x": {content},\n"report.html"')):
        (made / "bundle.json").write_text(text)
        with pytest.raises(BundleError):
            bundle.load(made)
    deep = facts.replace('"targets"', f'"x": {"[" * 900}{"]" * 900}, "targets"')
    (made / "bundle.json").write_text(deep)
    with pytest.raises(BundleError):
        bundle.load(made)


@pytest.mark.parametrize(
    "known",
    [np.zeros((0, DIM)), np.zeros((3, DIM + 1)), np.zeros(DIM), np.full((3, DIM), np.nan), np.zeros((2, 2), "c8")],
)
def test_reference_embeddings_that_are_none_are_refused(known: Any, tmp_path: Path) -> None:
    made = saved(tmp_path / "b", ("logreg", "multiclass", ""))
    np.save(made / "reference.npy", known.astype(np.float32) if known.dtype == np.float64 else known)
    with pytest.raises(BundleError, match=r"reference"):
        bundle.load(sign(made))


def of_tree(**changes: Any) -> Callable[[Any], None]:
    def change(head: Any) -> None:
        tree = head["head"].tree_
        state = tree.__getstate__()
        for name, value in changes.items():
            if name in state:
                state[name] = value
            else:
                state["nodes"][name][0] = value
        tree.__setstate__(state)

    return change


def of_boosting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda head: head["head"]._predictors[-1][0].nodes[name].__setitem__(0, value)


def sets(path: str, value: Any) -> Callable[[Any], None]:
    """Set what a dotted path from the head leads to; a function is given what is there."""

    def change(head: Any) -> None:
        *before, last = path.split(".")
        for name in before:
            head = getattr(head, name)
        setattr(head, last, value(getattr(head, last)) if callable(value) else value)

    return lambda head: change(head["head"])


TREE: Head = ("tree", "binary", "")
FOREST: Head = ("random_forest", "multiclass", "")
BOOSTED: Head = ("hist_gradient_boosting", "regression", "")
SVC: Head = ("rbf_svm", "multiclass", "")
SVR: Head = ("rbf_svm", "regression", "")
KNN: Head = ("knn", "multiclass", "")
LOGREG: Head = ("logreg", "multiclass", "")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((TREE, of_tree(left_child=value)) for value in (0, 10**6, -2, -(2**62))),
        *((TREE, of_tree(right_child=value)) for value in (0, 10**6, -1)),
        *((TREE, of_tree(feature=value)) for value in (DIM, -2, 2**62)),
        *((TREE, sets("n_features_in_", value)) for value in (DIM + 1, None)),
        (TREE, sets("n_outputs_", 10**9)),
        (TREE, lambda head: delattr(head["head"], "n_features_in_")),
        (FOREST, lambda head: of_tree(feature=DIM)({"head": head["head"].estimators_[2]})),
        (FOREST, sets("n_jobs", 10**6)),
        (FOREST, sets("estimators_", [])),
        (FOREST, sets("n_classes_", 10**9)),
        *((BOOSTED, of_boosting(name, value)) for name in ("left", "right") for value in (0, 10**6)),
        (BOOSTED, of_boosting("feature_idx", DIM)),
        (BOOSTED, of_boosting("is_categorical", 1)),
        (BOOSTED, sets("_bin_mapper.is_categorical_", lambda old: np.ones_like(old))),
        (BOOSTED, sets("n_trees_per_iteration_", 10**9)),
        *((kind, sets("_n_support", lambda old: old * 1000)) for kind in (SVC,)),
        (SVC, sets("_n_support", lambda old: old + np.array([1, -1, 0], np.int32) * 10**6)),
        *((kind, sets("support_vectors_", lambda old: old[:, :2].copy())) for kind in (SVC, SVR)),
        *((kind, sets("_dual_coef_", lambda old: old[:, :2].copy())) for kind in (SVC, SVR)),
        *((kind, sets("_intercept_", lambda old: old[:0].copy())) for kind in (SVC, SVR)),
        *((kind, sets("support_", lambda old: old[:1].copy())) for kind in (SVC, SVR)),
        *((SVC, sets("kernel", value)) for value in ("precomputed", "linear", lambda old: str)),
        *((SVC, sets("_effective_probability", True)), (SVC, sets("probability", True))),
        *((KNN, sets("_y", lambda old, value=value: old + value)) for value in (1, -1, 10**9)),
        (KNN, sets("_y", lambda old: old[:3].copy())),
        *((KNN, sets("n_neighbors", value)) for value in (0, -1, 61, 10**12, 2.5, True)),
        *((KNN, sets("metric", value)) for value in ("precomputed", "seuclidean", lambda old: str)),
        (KNN, sets("_fit_X", lambda old: old * np.inf)),
        (LOGREG, sets("predict", str)),
        (LOGREG, sets("coef_", lambda old: np.repeat(old, 2, axis=0))),
        (LOGREG, sets("intercept_", lambda old: np.zeros((9, 1)))),
        (LOGREG, sets("classes_", lambda old: old[:2].copy())),
    ],
)
def test_a_head_that_compiled_code_would_stumble_over_is_refused(
    kind: Head, change: Callable[[Any], None], tmp_path: Path
) -> None:
    head = fitted_head(*kind)
    facts = facts_of({"a": head})
    if kind is SVR:
        head = head.named_steps
        inner = {"head": head["head"].regressor_}
        change(inner)
        head = fitted_head(*kind).set_params(head=head["head"])
    else:
        change(head)
    bundle.save(tmp_path / "b", {"a": head}, facts, {})
    with pytest.raises(BundleError, match="cannot be loaded"):
        bundle.load(tmp_path / "b")


@pytest.mark.parametrize("count", [0, -1, 1])
def test_a_tree_that_is_not_as_long_as_it_says_is_refused(count: int, tmp_path: Path) -> None:
    made = saved(tmp_path / "b", TREE)
    members = unzipped(made)
    schema = json.loads(members.pop("schema.json"))
    for node in nodes_of(schema):
        if node["__loader__"] == "TreeNode":
            node["content"]["content"]["node_count"]["content"] = str(count)
    content = zipped([("schema.json", json.dumps(schema).encode()), *members.items()])
    (made / "head.skops").write_bytes(content)
    with pytest.raises(BundleError, match="the nodes of a tree of the head do not fit"):
        bundle.load(sign(made))


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_tree_whose_nodes_are_no_list_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    made = saved(tmp_path / "b", TREE)
    members = unzipped(made)
    (name,) = [name for name, content in members.items() if b"left_child" in content[:128]]
    np.save(nodes := io.BytesIO(), np.zeros(shape))
    (made / "head.skops").write_bytes(zipped([*(members | {name: nodes.getvalue()}).items()]))
    with pytest.raises(BundleError, match="the nodes of a tree are no list"):
        bundle.load(sign(made))


def test_a_head_that_fails_on_images_is_blamed(tmp_path: Path) -> None:
    """Scales that only other embeddings than the reference make infinite."""
    head = fitted_head(*LOGREG)
    head["scale"].scale_ = np.full(DIM, 1e-39)
    known = np.tile(head["scale"].mean_.astype(np.float32), (3, 1))
    head["scale"].mean_ = known[0].astype(np.float64)
    bundle.save(tmp_path / "b", {"a": head}, facts_of({"a": head}), {}, known)
    trained = bundle.load(tmp_path / "b")
    with pytest.raises(BundleError, match="the bundle cannot predict: ValueError: Input X contains infinity"):
        records.said(trained, X)


def test_a_bundle_holds_a_head_for_each_target(tmp_path: Path) -> None:
    fitted = {name: fitted_head(*TREE) for name in ("a", "b")}
    bundle.save(tmp_path / "b", fitted, facts_of({"a": fitted["a"]}), {})
    with pytest.raises(BundleError, match="does not hold the heads for a"):
        bundle.load(tmp_path / "b")
    assert json.loads((tmp_path / "b/bundle.json").read_text())["targets"][0]["name"] == "a"
