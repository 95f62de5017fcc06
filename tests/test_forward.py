from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from conftest import answer
from features import backbones, forward, images, transforms
from features.errors import BackboneError
from features.extract import extract
from features.forward import Forward, Frozen
from features.sources import list_source
from features.store import FeatureStore
from features.views import UNTRAINED, Request, View

SHIPPED = {"mobilenet_v2": "fp32", "squeezenet1_1": "bf16"}
"""What ``auto`` comes to where the hardware has units for bf16: mobilenet_v2 does not bear it."""


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


class Mean(torch.nn.Module):
    """Of each channel; runs out of memory with more than `most` images."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.most, self.seen = most, list[int]()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
        self.seen.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("no memory left")
        return (batch.float().mean((1, 2)),)


def noise(count: int, side: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def test_batches_are_halved_until_they_fit() -> None:
    model, pictures = Mean(most=9), noise(50)
    run = Forward(model, torch.device("cpu"), 32)
    assert torch.allclose(run(pictures)[0], torch.from_numpy(pictures).float().mean((1, 2)))
    assert run.batch == 8 and model.seen == [32, 16, *[8] * 6, 2]
    with pytest.raises(BackboneError, match="cpu has not enough memory for one image"):
        Forward(Mean(most=0), torch.device("cpu"), 2)(pictures)


def test_batches_that_were_halved_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = Mean(most=9), noise(20)
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda batch: module(batch))
    run = Forward(model, torch.device("cpu"), 16)
    run.compile(side=8)
    assert run.batch == 8 and run.compiled is not None
    model.most, model.seen = 5, []
    assert torch.allclose(run(pictures)[0], torch.from_numpy(pictures).float().mean((1, 2)))
    assert run.batch == 4 and set(model.seen[1:]) == {4}


def test_a_compiled_model_sees_one_shape_only() -> None:
    model = Mean()
    run = Forward(torch.nn.Identity(), torch.device("cpu"), 4, compiled=model)
    pictures = noise(6)
    assert torch.allclose(run(pictures)[0], torch.from_numpy(pictures).float().mean((1, 2)))
    assert model.seen == [4, 4]


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (100, 60), (224, 300)])
def test_what_the_model_reads_is_what_the_weights_ask_for(size: tuple[int, int]) -> None:
    class Keep(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
            return (batch.clone(),)

    transform = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    frozen = Frozen(Keep(), transform)
    (seen,) = frozen(torch.from_numpy(transforms.crop(transform, image).copy())[None])
    assert torch.equal(seen[0], transform(image))


def test_the_probe_depends_on_hardware_and_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tender(torch.nn.Module):
        """What it gives is what sixteen bits lose."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
            means = batch.float().mean((2, 3)) * self.weight
            return (means - means.bfloat16().float() + 1e-6 * means,)

    transform, cpu = ImageClassification(crop_size=32), torch.device("cpu")
    before = torch.get_rng_state()
    for has, model, expected in (
        (True, torch.nn.Flatten(), "bf16"),
        (True, Tender(), "fp32"),
        (False, torch.nn.Flatten(), "fp32"),
    ):
        monkeypatch.setattr(forward, "_has_bf16", lambda _, has=has: has)
        frozen = Frozen(torch.nn.Sequential(model) if isinstance(model, Tender) else Vectors(model), transform)
        state = {key: value.clone() for key, value in frozen.state_dict().items()}
        assert forward.best_precision(frozen, cpu, 32) == expected
        assert all(torch.equal(state[key], value) for key, value in frozen.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


class Vectors(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(batch).float(),)


def precision_of(store: FeatureStore) -> str:
    (view,) = store.views().values()
    assert view.request.precision == view.spec["precision"]
    return str(view.spec["precision"])


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_for_the_hardware_and_then_for_the_view(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    monkeypatch.setattr(forward, "_has_bf16", lambda _: has)
    # It bears sixteen bits, which tiny does not.
    request = Request.parse("squeezenet1_1", "untrained")
    first = sorted(photos.rglob("*.png"))[:6]
    aside = [path.rename(photos.parent / f"{number}.png") for number, path in enumerate(first)]
    extract(list_source(str(photos)), store, [request])
    assert precision_of(store) == ("bf16" if has else "fp32")
    monkeypatch.setattr(forward, "_has_bf16", lambda _: not has)
    for old, new in zip(aside, first, strict=True):
        old.rename(new)
    assert extract(list_source(str(photos)), store, [request])["embedded"] == 6
    assert len(store.views()) == 1 and len(store.load().ids) == 24


def test_another_precision_than_the_views_is_refused(permafrost: Any, photos: Path, tmp_path: Path) -> None:
    run = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    permafrost(*run, "--precision", "bf16")
    said = permafrost(*run, "--precision", "fp32", code=5).stderr
    assert "precision is 'bf16', asked for 'fp32'" in said and said.count("\n") == 1
    assert "use auto, fp32, bf16, fp16" in permafrost(*run, "--precision", "int8", code=2).stderr
    assert "use auto, on, off" in permafrost(*run, "--compile", "maybe", code=2).stderr


@pytest.mark.slow
def test_compiled_or_not_the_vectors_are_alike(process: Any, photos: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        for how in ("off", "on", "on"):
            store = tmp_path / f"{precision}-{how}-{len(found)}"
            process(
                *("extract", photos, "--store", store, "--backbone", "squeezenet1_1", "--weights", "untrained"),
                *("--precision", precision, "--compile", how),
            )
            found[precision, how, len(found)] = FeatureStore.open(str(store)).load().embeddings
    plain, *others = found.values()
    assert min(cosine(plain, other).min() for other in others) >= 0.9995
    assert np.allclose(others[0], plain, rtol=1e-4, atol=1e-5)
    # The second time by what the first has left in the cache.
    assert np.array_equal(others[0], others[1]) and np.array_equal(others[3], others[4])


@pytest.mark.slow
def test_without_a_compiler_a_run_says_so_and_goes_on(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "extract", photos, "--store", tmp_path / "store"]
    environment = os.environ | {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*map(str, command), "--backbone", "tiny", "--compile", "on", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["embedded"] == 24
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("embedding: ")]
    assert told.startswith("permafrost: the model could not be compiled and runs slower")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("pictures", ["hymenoptera", "caltech20"])
def test_the_fast_path_is_the_reference_path(
    name: str, pictures: str, process: Any, testdata: Path, tmp_path: Path
) -> None:
    origin = testdata / "weights" / f"{name}-imagenet.pth"
    run = ("extract", testdata / pictures, "--store", tmp_path / "fast", "--backbone", name, "--weights", origin)
    process(*run, "--compile", "on")
    # Decoded in full, float32, eager: that this is what PIL, the weights' transforms and an untouched model give is for
    # test_backbones.
    fast, exact = (FeatureStore.open_or_new(str(tmp_path / which)) for which in ("fast", "exact"))
    request = Request.parse(name, str(origin), precision="fp32")
    reference = backbones.load([request], decode=images.POLICY)
    exact.add_view(View(request.view_name, reference.specs[0], reference.dims[0], request))
    extract(list_source(str(testdata / pictures)), exact, [request], compile="off")
    if forward._has_bf16(torch.device("cpu")):
        assert precision_of(fast) == SHIPPED[name]
    assert (fast.load().ids == exact.load().ids).all()
    assert cosine(fast.load().embeddings, exact.load().embeddings).min() >= 0.9995
    # One in a hundred embeddings is near another in one view only; the folds have to be the same.
    where = ("--split-near-duplicates", *(("--where", "split = 'train'") if pictures == "hymenoptera" else ()))
    scores = []
    for store in ("fast", "exact"):
        out = tmp_path / f"{store}-bundle"
        trained = answer(process("train", tmp_path / store, "--target", "label", *where, "--out", out, "--json"))
        scores.append(trained["targets"][0]["cross_validation"]["head"]["accuracy"]["value"])
    assert abs(scores[0] - scores[1]) <= 0.005


@pytest.mark.slow
def test_two_runs_give_the_same_bits(process: Any, photos: Path, tmp_path: Path) -> None:
    for store in ("one", "two"):
        process("extract", photos, "--store", tmp_path / store, "--backbone", "tiny")
    one, two = (FeatureStore.open(str(tmp_path / store)).load() for store in ("one", "two"))
    assert np.array_equal(one.embeddings, two.embeddings)


def test_threads_and_batches_change_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, threads = [], torch.get_num_threads()
    for number, (batch, at_once) in enumerate([(32, 1), (5, 2), (1, threads)]):
        monkeypatch.setitem(forward.BATCH, "cpu", batch)
        torch.set_num_threads(at_once)
        store = FeatureStore.open_or_new(str(tmp_path / f"{number}"))
        extract(list_source(str(photos)), store, [Request.parse("tiny", precision="fp32")])
        found.append(store.load().embeddings)
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert (np.linalg.norm(other - found[0], axis=1) <= 1e-5 * np.linalg.norm(found[0], axis=1)).all()


def test_a_view_keeps_its_decoding(photos: Path, tmp_path: Path) -> None:
    store, request = FeatureStore.open_or_new(str(tmp_path / "store")), Request.parse("tiny", precision="fp32")
    older = backbones.load([request], decode=images.POLICY)
    assert not older.reduced and backbones.load([request]).reduced
    store.add_view(View("older", older.specs[0], older.dims[0], request))
    assert extract(list_source(str(photos)), store, [Request.parse("tiny")], view="older")["embedded"] == 24
    large = Request.parse("efficientnet_b7", UNTRAINED)
    assert transforms.decode_policy(transforms.of(large)) == images.POLICY
