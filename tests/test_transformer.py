from __future__ import annotations

import copy
import inspect
import pickle
import pkgutil
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.estimator_checks import check_estimator

import pipeline
from features.errors import BackboneError, InputError, StoreError
from features.store import FeatureStore
from pipeline import tuning
from pipeline.transformer import BackboneTransformer

DIM = 1280


def same(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=0, atol=1e-5))


# What scikit-learn's own checks can tell


def test_every_estimator_of_ours_that_takes_a_matrix_passes_check_estimator() -> None:
    modules = [import_module(f"pipeline.{module.name}") for module in pkgutil.iter_modules(pipeline.__path__)]
    ours = {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, BaseEstimator) and kind.__module__.startswith("pipeline.")
    }
    assert ours == {BackboneTransformer, tuning._Kernel}
    for kind in ours:
        takes_a_matrix = kind is not BackboneTransformer
        assert get_tags(kind()).input_tags.two_d_array == takes_a_matrix
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = check_estimator(kind())
        assert {check["status"] for check in done} <= {"passed", "skipped"}
        assert len([check for check in done if check["status"] == "passed"]) > (40 if takes_a_matrix else 0)


@pytest.mark.parametrize(
    "name",
    [
        "check_estimator_cloneable",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
        "check_estimator_repr",
        "check_no_attributes_set_in_init",
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_mixin_order",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
    ],
)
def test_checks_of_scikit_learn_that_need_no_data(name: str) -> None:
    getattr(estimator_checks, name)("BackboneTransformer", BackboneTransformer())


# The same contract on images


def test_parameters_are_touched_neither_by_init_nor_by_fit(paths: list[str], tmp_path: Path) -> None:
    given = {"backbone": "tiny", "weights": None, "layer": None, "pooling": None, "precision": "fp32"}
    given |= {"store": tmp_path / "store", "missing": "nan", "combine": "mean", "device": "cpu"}
    transformer = BackboneTransformer(**given)
    assert vars(transformer) == given and all(vars(transformer)[name] is value for name, value in given.items())
    transformer.fit_transform(paths)
    assert transformer.get_params() == given


def test_parameters_can_be_asked_for_and_set() -> None:
    transformer = BackboneTransformer().set_params(backbone="mobilenet_v2", missing="zeros")
    assert transformer.get_params()["backbone"] == "mobilenet_v2" and transformer.missing == "zeros"
    with pytest.raises(ValueError, match="Invalid parameter 'colour'"):
        transformer.set_params(colour="red")


def test_a_clone_has_the_parameters_alone_and_takes_less_than_a_millisecond(paths: list[str]) -> None:
    fitted = BackboneTransformer(missing="zeros").fit(paths)
    assert vars(clone(fitted)) == fitted.get_params()
    begun = time.perf_counter()
    for _ in range(50):
        clone(fitted)
    assert (time.perf_counter() - begun) / 50 < 1e-3


def test_fit_returns_itself_and_can_be_repeated(paths: list[str]) -> None:
    transformer = BackboneTransformer()
    assert transformer.fit(paths) is transformer
    first = transformer.transform(paths)
    frame = pd.DataFrame({"front": paths, "back": paths})
    assert transformer.fit(frame).n_features_in_ == 2 and transformer.transform(frame).shape == (24, 2 * DIM)
    assert same(transformer.fit(paths).transform(paths), first) and not hasattr(transformer, "feature_names_in_")
    assert same(BackboneTransformer().fit_transform(paths, ["ignored"] * 24), first)


def test_what_is_given_stays_as_it_is(paths: list[str]) -> None:
    arrays = [np.array(Image.open(path)) for path in paths[:3]]
    pictures = [Image.fromarray(array) for array in arrays]
    frame = pd.DataFrame({"front": paths[:3], "back": arrays, "side": pictures}, index=[7, 8, 9])
    before = copy.deepcopy(frame)
    BackboneTransformer(store=None).fit(frame).transform(frame)
    assert frame.index.tolist() == [7, 8, 9] and frame["front"].equals(before["front"])
    assert all(np.array_equal(one, other) for one, other in zip(frame["back"], before["back"], strict=True))
    assert all(one == other for one, other in zip(frame["side"], before["side"], strict=True))


@pytest.mark.parametrize("missing", ["error", "nan", "zeros"])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_transform_is_alike_one_by_one_in_batches_in_another_order_and_after_pickling(
    paths: list[str], precision: str, missing: str
) -> None:
    transformer = BackboneTransformer(precision=precision, missing=missing).fit(paths)
    whole = transformer.transform(paths)
    assert whole.dtype == np.float32 and len(np.unique(whole, axis=0)) == 24
    assert same(np.vstack([transformer.transform([path]) for path in paths]), whole)
    assert same(np.vstack([transformer.transform(paths[start : start + 7]) for start in range(0, 24, 7)]), whole)
    order = np.random.default_rng(0).permutation(24)
    assert same(transformer.transform([paths[place] for place in order]), whole[order])
    assert same(pickle.loads(pickle.dumps(transformer)).transform(paths), whole)
    assert same(transformer.transform(paths * 2), np.vstack([whole, whole]))


def test_names_of_features_go_in_and_come_out(paths: list[str]) -> None:
    transformer = BackboneTransformer().fit(paths)
    assert transformer.get_feature_names_out().tolist() == [f"x0_{place}" for place in range(DIM)]
    frame = pd.DataFrame({"front": paths, "back": paths})
    transformer = BackboneTransformer(missing="zeros").fit(frame)
    names = transformer.get_feature_names_out()
    assert transformer.feature_names_in_.tolist() == ["front", "back"] and transformer.n_features_in_ == 2
    assert names[[0, DIM, 2 * DIM, -1]].tolist() == ["front_0", "back_0", "front_missing", "back_missing"]
    assert len(names) == transformer.transform(frame).shape[1] and names.dtype == object
    assert (transformer.get_feature_names_out(["front", "back"]) == names).all()
    with pytest.raises(ValueError, match="input_features is not equal"):
        transformer.get_feature_names_out(["back", "front"])
    means = transformer.set_params(combine="mean").get_feature_names_out()
    assert means[[0, -1]].tolist() == ["tiny_0", "tiny_missing"] and len(means) == DIM + 1
    with pytest.raises(ValueError, match="should match those that were passed during fit"):
        transformer.transform(frame[["back", "front"]])
    one = frame[["front"]].to_numpy()
    with (
        pytest.warns(UserWarning, match="X does not have valid feature names"),
        pytest.raises(ValueError, match="X has 1 features, but BackboneTransformer is expecting 2"),
    ):
        transformer.transform(one)


def test_set_output_gives_frames_of_pandas_and_polars(paths: list[str]) -> None:
    series = pd.Series(paths, index=range(100, 124))
    plain = BackboneTransformer().fit_transform(series)
    frame = BackboneTransformer().set_output(transform="pandas").fit_transform(series)
    assert isinstance(frame, pd.DataFrame) and frame.index.equals(series.index) and same(frame, plain)
    assert frame.columns.tolist() == [f"x0_{place}" for place in range(DIM)] and set(frame.dtypes) == {np.dtype("f4")}
    table = BackboneTransformer().set_output(transform="polars").fit(paths).transform(paths)
    assert isinstance(table, pl.DataFrame) and table.columns[1] == "x0_1" and same(table.to_numpy(), plain)


def test_one_sample_is_enough_and_none_is_too_few(paths: list[str]) -> None:
    transformer = BackboneTransformer().fit(paths[:1])
    assert transformer.transform(paths[:1]).shape == (1, DIM)
    empty: list[Any] = [[], np.array([], object), pd.Series([], dtype=object), np.zeros((0, 8, 8, 3), np.uint8)]
    for X in empty:
        with pytest.raises(ValueError, match=r"found 0 sample\(s\)"):
            transformer.transform(X)
        with pytest.raises(ValueError, match=r"found 0 sample\(s\)"):
            BackboneTransformer().fit(X)
    with pytest.raises(ValueError, match=r"found 0 feature\(s\)"):
        BackboneTransformer().fit(pd.DataFrame(index=[1, 2]))


def test_parameters_that_mean_nothing_are_refused_by_fit(paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("no store")
    for given, kind, told in (
        ({"missing": "skip"}, InputError, "missing='skip' is unknown; use error, nan, zeros"),
        ({"combine": "max"}, InputError, "combine='max' is unknown; use concatenate, mean"),
        ({"backbone": "resnet19"}, BackboneError, "backbone 'resnet19' is unknown"),
        ({"weights": "not-there.pth"}, BackboneError, "not-there.pth cannot be read"),
        ({"device": "cuda:99"}, BackboneError, "device 'cuda:99' is not here"),
        ({"store": tmp_path}, StoreError, "is not empty and no feature store"),
        ({"backbone": None}, InputError, "backbone is of type NoneType; pass a text"),
        ({"layer": 3}, InputError, "layer is of type int; pass a text"),
        ({"store": 5}, InputError, "store is of type int; pass a path or URL"),
    ):
        with pytest.raises(kind, match=told):
            BackboneTransformer(**given).fit(paths)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing='skip' is unknown"):
        BackboneTransformer().fit(paths).set_params(missing="skip").transform(paths)


def test_without_fit_nothing_is_transformed(paths: list[str]) -> None:
    for call in (lambda: BackboneTransformer().transform(paths), BackboneTransformer().get_feature_names_out):
        with pytest.raises(NotFittedError):
            call()


def test_tags_tell_the_truth(paths: list[str]) -> None:
    for missing in ("error", "nan", "zeros"):
        transformer = BackboneTransformer(missing=missing)
        tags = get_tags(transformer)
        assert tags.requires_fit and not tags.no_validation and not tags.non_deterministic
        assert not tags.target_tags.required and tags.transformer_tags.preserves_dtype == []
        assert tags.input_tags.one_d_array and tags.input_tags.string and not tags.input_tags.sparse
        assert tags.input_tags.allow_nan == (missing != "error")
        transformer.fit(paths)
        if tags.input_tags.allow_nan:
            transformer.transform([*paths, np.nan])
        else:
            with pytest.raises(ValueError, match="1 of 25 images cannot be used; the first, row 24: no image; mend"):
                transformer.transform([*paths, np.nan])


def test_importing_it_loads_no_torch() -> None:
    check = "import sys, pipeline.transformer; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "False"


def test_embeddings_are_those_that_extract_makes(photos: Path, permafrost: Any, tmp_path: Path) -> None:
    permafrost("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    ids, embeddings, _ = FeatureStore.open(str(tmp_path / "store")).load()
    assert same(BackboneTransformer().fit_transform([str(photos / key) for key in ids]), embeddings)
