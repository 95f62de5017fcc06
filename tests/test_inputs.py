from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from joblib import parallel_config
from PIL import Image
from sklearn.pipeline import make_union

from features.errors import InputError
from pipeline.transformer import BackboneTransformer


def same(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=0, atol=1e-5))


def held(paths: list[str]) -> dict[str, Any]:
    """The same images in all shapes that are taken."""
    arrays = [np.asarray(Image.open(path)) for path in paths]
    files = [Path(path).read_bytes() for path in paths]
    return {
        "paths": [Path(path) for path in paths],
        "tuple": tuple(paths),
        "URLs": [f"file://{path}" for path in paths],
        "bytes": files,
        "bytearrays": [bytearray(file) for file in files],
        "files of PIL": [Image.open(path) for path in paths],
        "images of PIL": [Image.fromarray(array) for array in arrays],
        "arrays": arrays,
        "arrays that lie otherwise": [np.asfortranarray(array) for array in arrays],
        "one array": np.stack(arrays),
        "array of texts": np.array(paths),
        "array of texts of any length": np.array(paths, np.dtypes.StringDType()),
        "column of Arrow": pa.chunked_array([paths[:5], paths[5:]]),
        "table of Arrow": pa.table({"image": files}),
        "array of objects": np.array(paths, object),
        "rows of one": [[path] for path in paths],
        "column": np.array(paths, object)[:, None],
        "Series": pd.Series(paths),
        "Series of bytes": pd.Series(files, dtype=object),
        "DataFrame": pd.DataFrame({"image": paths}),
        "DataFrame of arrays": pd.DataFrame({"image": arrays}),
        "Series of Polars": pl.Series(paths),
        "DataFrame of Polars": pl.DataFrame({"image": files}),
        "all kinds": [paths[0], Path(paths[1]), files[2], Image.open(paths[3]), arrays[4], *paths[5:]],
    }


def test_lists_arrays_series_and_frames_of_whatever_is_an_image_are_taken(paths: list[str], tmp_path: Path) -> None:
    expected = BackboneTransformer().fit_transform(paths)
    for name, X in held(paths).items():
        for store in (None, tmp_path / "store"):
            assert same(BackboneTransformer(store=store).fit_transform(X), expected), name


def test_grey_and_clear_arrays_are_understood_as_files_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for mode, shape in (("L", (40, 50)), ("RGBA", (40, 50, 4)), ("RGB", (40, 50, 3))):
        array = random.integers(0, 256, shape, np.uint8)
        Image.fromarray(array).save(tmp_path / f"{mode}.png")
        one, other = BackboneTransformer().fit_transform([array, str(tmp_path / f"{mode}.png")])
        assert same(one, other), mode
    assert same(*BackboneTransformer().fit_transform([array[..., 0], array[..., :1]]))


def test_images_of_pil_are_turned_as_their_files_are(tmp_path: Path) -> None:
    array = np.zeros((40, 60, 3), np.uint8)
    array[:10] = (250, 30, 10)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(array).save(tmp_path / "turned.png", exif=turned)
    X = [str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png"), np.rot90(array, -1), array]
    file, picture, upright, lying = BackboneTransformer().fit_transform(X)
    assert same(file, upright) and same(picture, upright) and not same(lying, upright)


@pytest.mark.parametrize(
    ("X", "told"),
    [
        ("a.jpg", "X is one str; pass a list"),
        (b"\xff\xd8", "X is one bytes; pass a list"),
        (Image.new("RGB", (9, 9)), "X is one Image; pass a list"),
        (None, "X is one NoneType"),
        ({"a.jpg": 1}, "X is one dict"),
        (np.zeros((5, 3)), r"X is an array of float64 with shape \(5, 3\)"),
        (
            np.zeros((8, 8, 3), np.uint8),
            r"array of uint8 with shape \(8, 8, 3\); .* shape \(images, height, width, 3\)",
        ),
        (np.zeros((2, 8, 8, 3)), "X is an array of float64"),
        (np.array([b"GIF89a"]), r"X is an array of \|S6"),
        (["a.jpg", 3], "row 1 is of type int: 3; images are paths, URLs, bytes"),
        ([["a.jpg"], [{}]], "row 1 is of type dict"),
        ([["a.jpg", "b.jpg"], ["c.jpg"]], "rows of X have from 1 to 2 images; fill short ones up with None"),
        ([np.zeros((8, 8, 3), np.float32)], r"row 0 is an array of float32 with shape \(8, 8, 3\)"),
        ([np.zeros((3, 224, 224), np.uint8)], r"row 0 is an array of uint8 with shape \(3, 224, 224\)"),
        (["\x00140"], "row 0 is a text that begins with NUL"),
        (["\ud800.jpg"], "row 0 is a text that is not Unicode"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(X: Any, told: str, paths: list[str]) -> None:
    fitted = BackboneTransformer().fit(paths)
    for call in (BackboneTransformer().fit, fitted.transform):
        with pytest.raises(InputError, match=told) as error:
            call(X)
        assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_a_wrong_cell_is_told_with_its_column() -> None:
    with pytest.raises(InputError, match="row 1 of column 1 is of type int: 3"):
        BackboneTransformer().fit([["a.jpg", "b.jpg"], ["c.jpg", 3]])


def test_a_path_need_not_be_unicode(paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x\udcff.png").write_bytes(Path(paths[0]).read_bytes())
    assert same(*BackboneTransformer().fit_transform([paths[0], "x\udcff.png"]))


def test_threads_may_share_images_that_pil_has_only_opened(tmp_path: Path) -> None:
    random, files = np.random.default_rng(0), [tmp_path / f"{number}.jpg" for number in range(24)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (300, 300, 3), np.uint8)).save(file)
    expected = BackboneTransformer().fit_transform(files)
    both = make_union(BackboneTransformer(), BackboneTransformer(), n_jobs=2)
    with parallel_config("threading"):
        for _ in range(3):
            found = both.fit_transform([Image.open(file) for file in files])
            assert same(found, np.hstack([expected, expected]))
