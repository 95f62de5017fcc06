"""Near duplicates, on drawn embeddings and on real photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import duplicates
from pipeline.duplicates import Pairs, near_duplicates

Matrix = NDArray[np.float32]


def groups_of(X: Matrix) -> NDArray[np.int64]:
    return near_duplicates(X)[0]


def pairs_of(X: Matrix) -> Pairs:
    return near_duplicates(X)[1]


def strangers(rows: int, dim: int, seed: int = 0) -> Matrix:
    """Embeddings as of unlike images: not negative, of a few strong directions and many weak ones."""
    random = np.random.default_rng(seed)
    return np.abs(random.normal(size=(rows, dim)) @ random.normal(size=(dim, dim)) / np.arange(1, dim + 1)).astype("f4")


def noisy(X: Matrix, share: float, seed: int = 1) -> Matrix:
    return X + share * X.std(0) * np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)


def sequences(objects: int, frames: int, dim: int) -> tuple[Matrix, NDArray[np.int64]]:
    """Frames that move from one view of an object towards another."""
    ends = (
        strangers(objects, dim)[:, None]
        + 0.5 * strangers(objects, dim, 1)[:, None] * np.linspace(0, 1, frames)[:, None]
    )
    return noisy(ends.reshape(-1, dim), 0.05), np.repeat(np.arange(objects), frames)


def same(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    return bool(((a[:, None] == a) == (b[:, None] == b)).all())


@pytest.mark.parametrize(("rows", "dim"), [(60, 200), (400, 100), (3000, 200)])
def test_strangers_stay_alone_and_copies_meet(rows: int, dim: int) -> None:
    X = strangers(rows, dim)
    assert same(groups_of(X), np.arange(rows))
    groups = groups_of(np.vstack([X, noisy(X[:20], 0.02), noisy(X[:20], 0.02, 2)]))
    assert groups.dtype == np.int64 and same(groups, np.r_[np.arange(rows), np.arange(20), np.arange(20)])
    assert groups[:rows].tolist() == list(range(rows))


@pytest.mark.parametrize("times", [2, 3, 6])
def test_a_set_of_which_every_image_has_pairs_of(times: int) -> None:
    X = strangers(200, 300)
    groups = groups_of(np.vstack([noisy(X, 0.02, seed) for seed in range(times)]))
    assert same(groups, np.tile(np.arange(200), times))


def test_frames_of_one_object_meet() -> None:
    X, objects = sequences(40, 25, 200)
    groups = groups_of(X)
    assert (np.bincount(objects).max(), len(np.unique(groups))) == (25, 40)
    assert same(groups, objects)


def test_a_copy_of_a_sequence_joins_it() -> None:
    X, objects = sequences(20, 25, 200)
    assert same(groups_of(np.vstack([X, noisy(X[:50], 0.01, 3)])), np.r_[objects, objects[:50]])


def test_pairs_come_with_their_similarity() -> None:
    X = strangers(200, 100)
    pairs = pairs_of(np.vstack([X, noisy(X[:3], 0.02), X[3:5]]))
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == {(row, 200 + row) for row in range(5)}
    assert pairs.first[:2].tolist() == [3, 4] and pairs.similarity[:2] == pytest.approx(1, abs=1e-5)
    assert (np.diff(pairs.similarity) <= 0).all() and pairs.similarity.dtype == np.float32
    none = pairs_of(X)
    assert len(none.first) == len(none.second) == len(none.similarity) == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(30, 50), (80, 20), (10, 3)]), st.floats(1e-6, 1e6))
def test_neither_order_nor_scale_matters_for_pairs_of(seed: int, shape: tuple[int, int], scale: float) -> None:
    X = strangers(*shape, seed)
    X = np.vstack([X, noisy(X[:5], 0.02)])
    order = np.random.default_rng(seed).permutation(len(X))
    assert same(groups_of(X)[order], groups_of(X[order] * np.float32(scale)))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 10), st.integers(1, 40), st.sampled_from(["any", "zeros", "one value"]))
def test_tiny_sets(seed: int, rows: int, dim: int, kind: str) -> None:
    X = strangers(rows, dim, seed) if kind == "any" else np.full((rows, dim), kind == "one value" and 0.1, np.float32)
    groups = groups_of(X)
    assert groups.shape == (rows,) and same(groups_of(np.vstack([X, X])), np.tile(groups, 2))
    if kind != "any":
        assert not groups.any()
    elif dim >= 20:
        assert same(groups, np.arange(rows))


def test_rows_at_the_mean_are_copies_of_each_other_alone() -> None:
    X = strangers(50, 20)
    X -= X.mean(0)
    assert same(groups_of(np.vstack([X, -X, np.zeros((3, 20), "f4")])), np.r_[np.arange(100), 100, 100, 100])


def test_more_pairs_than_are_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    X = strangers(100, 30)
    X = np.vstack([X, np.repeat(X[:2], 150, 0)])
    expected = np.r_[np.arange(100), np.repeat([0, 1], 150)]
    assert same(groups_of(X), expected)
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    monkeypatch.setattr(duplicates, "MOST_EDGES", 100)
    assert same(groups_of(X), expected)


def embedded(source: str, tmp_path: Path) -> tuple[list[str], Matrix]:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(source), store, [Request.parse("tiny")], compile="off")
    ids, X, _ = store.load("tiny-V2-penultimate")
    return list(ids), X


def test_reencoded_and_resized_photographs(testdata: Path, tmp_path: Path) -> None:
    photographs = sorted((testdata / "hymenoptera/val").rglob("*.jpg"))[:120]
    folder, random = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for number, path in enumerate(photographs):
        (folder / f"{number:03d}.jpg").write_bytes(path.read_bytes())
        if number < 40:
            image, share = Image.open(path).convert("RGB"), random.uniform(0.5, 0.9)
            image.save(buffer := io.BytesIO(), "JPEG", quality=int(random.integers(60, 96)))
            (folder / f"{number:03d}-again.jpg").write_bytes(buffer.getvalue())
            image.resize((round(image.width * share), round(image.height * share))).save(
                folder / f"{number:03d}-small.png"
            )
    ids, X = embedded(str(folder), tmp_path)
    original = np.array([int(id[:3]) for id in ids])
    pairs = pairs_of(X)
    right = int((original[pairs.first] == original[pairs.second]).sum())
    assert right >= 0.95 * len(pairs.first) and right >= 0.95 * 3 * 40
