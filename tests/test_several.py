"""Several views from one pass over a source."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Toy, answer, draw
from features import backbones, forward, images
from features.errors import BackboneError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import UNTRAINED, Request, View


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How each image was decoded: reduced or not."""
    calls, plain = list[bool](), images.decode

    def decode(data: bytes, large: Any = None, reduced: bool = False) -> images.Decoded:
        calls.append(reduced)
        return plain(data, large, reduced)

    monkeypatch.setattr(images, "decode", decode)
    return calls


def test_one_pass_fills_all_views(photos: Path, tmp_path: Path, decoded: list[bool]) -> None:
    # Two models with one transform, one of them with two layers; and one with a transform of its own.
    requests = [
        Request.parse("squeezenet1_1", UNTRAINED, precision="fp32"),
        Request.parse("resnet18", UNTRAINED, precision="fp32"),
        Request.parse("resnet18", UNTRAINED, "layer1", "fp32"),
        Request.parse("tiny", precision="fp32"),
    ]
    together = FeatureStore.open_or_new(str(tmp_path / "together"))
    record = extract(list_source(str(photos)), together, requests)
    names = [request.view_name for request in requests]
    assert (record["views"], record["embedded"], record["opened"]) == (names, 4 * 24, 24)
    assert len(decoded) == 24
    for name, request in zip(names, requests, strict=True):
        alone = FeatureStore.open_or_new(str(tmp_path / name))
        extract(list_source(str(photos)), alone, [request])
        assert together.view(name) == alone.view(name)
        assert np.allclose(together.load(name).embeddings, alone.load().embeddings, rtol=1e-4, atol=1e-5)
    assert extract(list_source(str(photos)), together, requests)["outcome"] == "unchanged"


def test_only_what_a_view_lacks_is_embedded(photos: Path, tmp_path: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    one, two = Request("toy", "V1"), Request("toy", "V2")
    extract(list_source(str(photos)), store, [one])
    assert extract(list_source(str(photos)), store, [one, two])["embedded"] == 24
    assert (toy.embedded, toy.loaded) == (48, 2)
    draw(photos / "new.png", (1, 2, 3))
    record = extract(list_source(str(photos)), store, [one, two])
    assert (record["opened"], record["embedded"], toy.embedded) == (1, 2, 50)
    assert (store.load("toy-V1-penultimate").ids == store.load("toy-V2-penultimate").ids).all()


def test_a_run_that_is_stopped_goes_on_in_all_views(
    photos: Path, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.embedding.PART", 5)
    store, requests = FeatureStore.open_or_new(str(tmp_path / "store")), [Request("toy", "V1"), Request("toy", "V2")]
    for toy.fail_after in itertools.count(4, 11):
        try:
            extract(list_source(str(photos)), store, requests)
            break
        except KeyboardInterrupt:
            toy.embedded = 0
    for request in requests:
        assert len(store.load(request.view_name).ids) == 24
        parts = list(Path(store.root.path, "embeddings", request.view_name).glob("*.parquet"))
        assert len(parts) == 5


def test_views_are_asked_for_on_the_command_line(permafrost: Any, photos: Path, tmp_path: Path) -> None:
    run = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--layer", "features.4")
    facts = answer(permafrost(*run, "--layer", "penultimate", "--pooling", "max", "--json"))
    assert facts["views"] == ["tiny-V2-features.4-max", "tiny-V2-penultimate"] and facts["embedded"] == 48
    said = permafrost(*run, "--layer", "penultimate", "--view", "mine", code=2).stderr
    assert "--view mine names one view, but 2 are asked for" in said and said.count("\n") == 1
    assert "the nearest are features." in permafrost(*run, "--layer", "featuers.4", code=2).stderr
    said = permafrost(*run, "--layer", "penultimate", "--pooling", "max").stdout
    assert "view tiny-V2-features.4-max, tiny-V2-penultimate" in said


def test_one_name_for_two_views_is_refused(photos: Path, tmp_path: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    with pytest.raises(BackboneError, match="the same name: toy-V1-penultimate"):
        extract(list_source(str(photos)), store, [Request("toy", "V1"), Request("toy", "V1")])


def test_nothing_is_made_of_a_request_that_fails_in_part(photos: Path, tmp_path: Path, permafrost: Any) -> None:
    run = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--backbone")
    assert "backbone 'resnet81' is unknown" in permafrost(*run, "resnet81", code=2).stderr
    assert not (tmp_path / "store").exists()


def test_auto_takes_what_a_run_beside_this_one_made_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, load = FeatureStore.open_or_new(str(tmp_path / "store")), backbones.load
    other = Request.parse("tiny", precision="bf16")
    monkeypatch.setattr(forward, "_has_bf16", lambda _: False)

    def slow(*arguments: Any) -> backbones.Backbone:
        if not store.views():
            theirs = load([other])
            store.add_view(View(other.view_name, theirs.specs[0], theirs.dims[0], other))
        return load(*arguments)

    monkeypatch.setattr(backbones, "load", slow)
    assert extract(list_source(str(photos)), store, [Request.parse("tiny")])["embedded"] == 24
    (view,) = store.views().values()
    assert view.spec["precision"] == "bf16"


def test_parts_are_bounded_in_bytes(photos: Path, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.embedding.PART_BYTES", 7 * 3 * 4)
    monkeypatch.setitem(forward.BATCH, "cpu", 4)
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    assert extract(list_source(str(photos)), store, [toy.request])["embedded"] == 24
    assert len(list((tmp_path / "store/embeddings/toy-V1-penultimate").glob("*.parquet"))) in (2, 3)
