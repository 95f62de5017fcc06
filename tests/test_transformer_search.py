from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from conftest import Toy, colours, draw, searched
from features import embedding, images, weights
from features.errors import ViewMismatch
from features.store import FeatureStore
from features.views import TINY_WEIGHTS
from pipeline.transformer import BackboneTransformer

DIM = 1280


# Once per image


def test_a_search_runs_the_backbone_once_per_distinct_image(
    paths: list[str], tmp_path: Path, forwarded: list[int]
) -> None:
    copies = [shutil.copy(path, tmp_path / f"copy-{place}.png") for place, path in enumerate(paths[:5])]
    X = [*paths, *map(str, copies)]
    search = searched(BackboneTransformer(store=tmp_path / "store")).fit(X, colours(paths) + colours(paths[:5]))
    assert sum(forwarded) == 24 and search.best_score_ > 0.9
    assert (search.predict(X) == colours(paths) + colours(paths[:5])).all() and sum(forwarded) == 24
    assert FeatureStore.open(str(tmp_path / "store")).snapshot().number == 0
    without = searched(BackboneTransformer()).fit(X, colours(paths) + colours(paths[:5]))
    assert np.allclose(without.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"])
    assert sum(forwarded) > 24 * 10


def test_a_search_over_real_images_runs_the_backbone_once_per_image(
    testdata: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    paths = sorted(map(str, (testdata / "hymenoptera").rglob("*.*")))
    search = searched(BackboneTransformer(store=tmp_path / "store")).fit(paths, colours(paths))
    assert len(paths) == 398 and sum(forwarded) == 398
    assert len(forwarded) <= -(-398 // 32) + 2 and search.best_score_ > 0.65
    assert len(pickle.dumps(search.best_estimator_[:1])) < 10_000
    head = len(pickle.dumps(search.best_estimator_[-1]))
    assert len(pickle.dumps(search.best_estimator_)) - head < 10_000


def test_an_image_that_comes_again_much_later_is_embedded_once(
    paths: list[str], forwarded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART", 8)
    embeddings = BackboneTransformer().fit_transform([*paths, *(Path(path).read_bytes() for path in paths)])
    assert sum(forwarded) == 24 and (embeddings[:24] == embeddings[24:]).all()


def test_what_extract_has_embedded_needs_no_model(
    photos: Path, paths: list[str], tmp_path: Path, permafrost: Any, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    permafrost("extract", photos, "--store", store, "--backbone", "tiny", "--view", "named")
    before = sorted(store.rglob("*"))
    loads.clear()
    decoded, decode = list[int](), images.decode
    monkeypatch.setattr(images, "decode", lambda data, *how: decoded.append(len(data)) or decode(data, *how))
    transformer = BackboneTransformer(store=store)
    embeddings = transformer.fit_transform(paths)
    assert not loads and transformer.view_.name == "named"
    assert len(embeddings) == 24 and not decoded
    assert sorted(store.rglob("*")) == before


def test_new_embeddings_come_in_parts_and_outlast_an_interruption(
    paths: list[str], tmp_path: Path, toy: Toy, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART", 8)
    transformer, toy.fail_after = BackboneTransformer("toy", store=tmp_path / "store").fit(paths), 17
    with pytest.raises(KeyboardInterrupt):
        transformer.transform(paths)
    assert len(list(tmp_path.glob("store/embeddings/*/*.parquet"))) == 2
    toy.fail_after, toy.embedded = None, 0
    means = transformer.transform(paths)
    assert toy.embedded == 8 and toy.loaded == 1
    assert np.allclose(means, [np.asarray(Image.open(path).resize((8, 8))).mean((0, 1)) for path in paths])
    assert len(list(tmp_path.glob("store/embeddings/*/*.parquet"))) == 3
    assert not list(tmp_path.glob("store/pending/*")) and not list(tmp_path.glob("store/tmp/*"))


def test_pixels_share_the_embedding_of_their_file_without_compression_alone(
    tmp_path: Path, forwarded: list[int], permafrost: Any
) -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(3)]
    Image.fromarray(arrays[0]).save(tmp_path / "same.ppm")
    transformer = BackboneTransformer(store=tmp_path / "store")
    first = transformer.fit_transform([*arrays, Image.fromarray(arrays[0]), str(tmp_path / "same.ppm")])
    assert sum(forwarded) == 3 and (first[[3, 4]] == first[0]).all()
    # Alike in bytes, yet another image.
    transformer.transform([arrays[0].reshape(40, 30, 3)])
    assert sum(forwarded) == 4
    permafrost("verify", tmp_path / "store")


def test_a_view_of_another_spec_keeps_its_name(paths: list[str], tmp_path: Path) -> None:
    first = BackboneTransformer(store=tmp_path / "store", precision="fp32").fit(paths)
    expected = first.transform(paths)
    changed = tmp_path / "V2.safetensors"
    save_file({key: tensor + 0.01 for key, tensor in weights.read_file(TINY_WEIGHTS).items()}, changed)
    other = BackboneTransformer(store=tmp_path / "store", weights=changed, precision="fp32").fit(paths)
    assert not np.allclose(other.transform(paths), expected, atol=1e-3)
    names = FeatureStore.open(str(tmp_path / "store")).views()
    assert sorted(names) == ["tiny-V2-penultimate", f"tiny-V2-penultimate-{other.view_.fingerprint[:8]}"]
    assert (first.transform(paths) == expected).all()
    save_file({key: tensor + 0.02 for key, tensor in weights.read_file(TINY_WEIGHTS).items()}, changed)
    with pytest.raises(ViewMismatch, match="set_params the same weights, or fit again"):
        other.set_params(store=None).transform(paths)


# Tables and metadata


def test_weights_of_samples_reach_the_head(paths: list[str], tmp_path: Path) -> None:
    y, weights = np.array(colours(paths)), np.where(np.array(colours(paths)) == "red", 100.0, 0.01)
    X = [str(draw(tmp_path / f"{place}.png", (100, 100, place % 2))) for place in range(24)]
    pipe = Pipeline([("images", BackboneTransformer(store=tmp_path / "store")), ("head", LogisticRegression())])
    by_prefix = pipe.fit(X, y, head__sample_weight=weights).predict_proba(X)
    assert (pipe.predict(X) == "red").all()
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = Pipeline([*pipe.steps[:1], ("head", LogisticRegression().set_fit_request(sample_weight=True))])
        assert np.allclose(pipe.fit(X, y, sample_weight=weights).predict_proba(X), by_prefix)
        search = GridSearchCV(
            pipe,
            {"head__C": [0.1, 1.0]},
            cv=3,
            scoring=make_scorer(accuracy_score).set_score_request(sample_weight=True),
        )
        assert (search.fit(X, y, sample_weight=weights).predict(X) == "red").all()
        assert BackboneTransformer().get_metadata_routing()._serialize() == {}


ROOMS = ["frontal", "bedroom", "bathroom", "kitchen"]


def of_houses(testdata: Path, rows: int) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    table = pd.read_csv(testdata / "houses/labels.csv", nrows=rows)
    for room in ROOMS:
        table[room] = [str(testdata / "houses" / name) for name in table[room]]
    return table.drop(columns="price"), np.log(table["price"].to_numpy(float))


def appraised(testdata: Path, store: Path, rows: int) -> GridSearchCV:
    X, y = of_houses(testdata, rows)
    columns = make_column_transformer(
        (BackboneTransformer(store=store), ROOMS),
        (OneHotEncoder(handle_unknown="ignore"), ["zipcode"]),
        (StandardScaler(), ["bedrooms", "bathrooms", "area"]),
    )
    grid = {
        "columntransformer__backbonetransformer__combine": ["concatenate", "mean"],
        "ridge__alpha": [1.0, 10.0, 100.0, 1000.0],
    }
    folds = KFold(3, shuffle=True, random_state=0)
    return GridSearchCV(make_pipeline(columns, Ridge()), grid, cv=folds, error_score="raise").fit(X, y)


def test_tables_with_several_photos_a_row_are_searched(testdata: Path, tmp_path: Path, forwarded: list[int]) -> None:
    search = appraised(testdata, tmp_path / "store", 40)
    X, _ = of_houses(testdata, 40)
    assert sum(forwarded) == len({Path(path).read_bytes() for room in ROOMS for path in X[room]})
    combined = search.cv_results_["param_columntransformer__backbonetransformer__combine"]
    assert set(combined) == {"concatenate", "mean"} and np.isfinite(search.cv_results_["mean_test_score"]).all()
    names = search.best_estimator_[0].get_feature_names_out()
    assert {"backbonetransformer__tiny_0", "backbonetransformer__kitchen_0"} & set(names)
    assert "standardscaler__area" in names


@pytest.mark.slow
def test_photos_and_columns_together_tell_prices(testdata: Path, tmp_path: Path) -> None:
    search = appraised(testdata, tmp_path / "store", 535)
    print(search.best_params_, search.best_score_)
    assert search.best_score_ > 0.5
