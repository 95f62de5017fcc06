from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from conftest import draw
from features.errors import InputError
from pipeline.transformer import BackboneTransformer

DIM = 1280


def broken(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    whole = draw(folder / "whole.png", (9, 9, 9)).read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    return str(folder / "cut.png")


def test_images_that_cannot_be_used_are_errors_with_row_and_reason(paths: list[str], tmp_path: Path) -> None:
    frame = pd.DataFrame({"front": paths[:4], "back": [*paths[4:7], broken(tmp_path / "odd")]})
    transformer = BackboneTransformer().fit(frame)
    with pytest.raises(InputError, match=r"1 of 8 .* row 3 of column 'back' \(.*cut.png\): (truncated|broken): .*nan"):
        transformer.transform(frame)
    for cell, told in (
        (str(tmp_path / "gone.jpg"), r"row 1 \(.*gone.jpg\): missing: no such file"),
        (b"", r"row 1 \(bytes\): empty"),
        (b"no image", r"row 1 \(bytes\): not_an_image"),
        (np.zeros((0, 5, 3), np.uint8), r"row 1 \(ndarray\): empty"),
        (Image.new("RGB", (500, 2)), r"row 1 \(Image\): too_large"),
        (Image.open(broken(tmp_path / "odd")), r"row 1 \(PngImageFile\): (truncated|broken)"),
        ("nowhere://name:secret@host/x?key=1", r"row 1 \(nowhere://host/x\): missing: no such place"),
    ):
        with pytest.raises(InputError, match=told):
            BackboneTransformer().fit_transform([paths[0], cell])


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("combine", ["concatenate", "mean"])
def test_missing_images_become_nan_or_zeros_with_a_mark(
    paths: list[str], tmp_path: Path, combine: str, store: bool
) -> None:
    gone = broken(tmp_path / "odd")
    frame = pd.DataFrame({"front": [*paths[:3], None, gone], "back": [paths[3], np.nan, pd.NA, None, paths[4]]})
    there = np.array([[1, 1], [1, 0], [1, 0], [0, 0], [0, 1]], bool)
    known = BackboneTransformer().fit_transform([*paths[:3], *paths[3:5]])
    expected = np.full((5, 2, DIM), np.nan, np.float32)
    expected[there] = known[[0, 3, 1, 2, 4]]
    if combine == "mean":
        expected[3] = 0
        expected = np.nanmean(expected, axis=1, keepdims=True)
        expected[3] = np.nan
        there = there.any(1, keepdims=True)
    expected = expected.reshape(5, -1)
    given: dict[str, Any] = {"combine": combine, "store": tmp_path / "store" if store else None}
    with pytest.warns(UserWarning, match=r"1 of 10 .* row 4 of column 'front' .*cut.png.*; they count as missing"):
        nan = BackboneTransformer(missing="nan", **given).fit_transform(frame)
    assert np.allclose(nan, expected, rtol=0, atol=1e-5, equal_nan=True)
    with pytest.warns(UserWarning, match="they count as missing"):
        zeros = BackboneTransformer(missing="zeros", **given).fit_transform(frame)
    assert np.allclose(zeros[:, : expected.shape[1]], np.nan_to_num(expected), rtol=0, atol=1e-5)
    assert (zeros[:, expected.shape[1] :] == ~there).all() and zeros.dtype == nan.dtype == np.float32


def test_nothing_but_missing_images_needs_no_image() -> None:
    assert np.isnan(BackboneTransformer(missing="nan").fit_transform([None, None])).all()
    with pytest.raises(InputError, match="2 of 2 images cannot be used; the first, row 0: no image; mend"):
        BackboneTransformer().fit([None, float("nan")])


def test_missing_images_go_through_an_imputer_and_through_trees(paths: list[str], tmp_path: Path) -> None:
    X, y = pd.Series(paths).where(np.arange(24) % 5 > 0), [Path(path).parent.name for path in paths]
    step = BackboneTransformer(missing="nan", store=tmp_path / "store")
    for head in (make_pipeline(SimpleImputer(), LogisticRegression()), HistGradientBoostingClassifier(max_iter=2)):
        scores = cross_val_score(make_pipeline(step, head), X, y, cv=3, error_score="raise")
        assert len(scores) == 3
    with pytest.raises(ValueError, match="NaN"):
        make_pipeline(step, LogisticRegression()).fit(X, y)
