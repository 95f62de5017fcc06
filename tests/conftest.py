"""What all tests share: drawn images, a backbone to compute in one's head, the command line, an S3 server, the data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from features import backbones, forward, images, parts
from features.backbones import Backbone
from features.forward import Forward
from features.store import FeatureStore
from features.views import Request, View
from pipeline import cli, predict, readthrough
from pipeline.bundle import Bundle

SECRET = "a-very-recognisable-secret"
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real images and weights, where there is one."""
    folder = os.environ.get("PERMAFROST_TESTDATA")
    if not folder:
        pytest.skip("PERMAFROST_TESTDATA is not set")
    return Path(folder).resolve()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-four noisy squares of three colours, as ``<split>/<colour>/<number>.png``."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for number in range(24):
        label = list(COLOURS)[number % 3]
        split = "test" if number >= 18 else "train"
        draw(folder / split / label / f"{number:02d}.png", COLOURS[label], random)
    return folder


def draw(path: Path, colour: tuple[int, int, int], random: np.random.Generator | None = None) -> Path:
    """Write a 20 x 16 image of one colour, with noise if there is a generator."""
    pixels = np.tile(np.array(colour, float), (16, 20, 1))
    if random is not None:
        pixels += random.normal(0, 20, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@dataclass
class Toy:
    """A backbone whose embedding of an image is its mean red, green and blue (0 to 255), and its tallies."""

    request: Request
    loaded: int = 0
    embedded: int = 0
    fail_after: int | None = None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Every backbone is the toy while a test uses this."""
    toy = Toy(Request("toy", "V1"))

    class Mean(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
            toy.embedded += len(batch)
            if toy.fail_after is not None and toy.embedded > toy.fail_after:
                raise KeyboardInterrupt
            return (batch.float().mean((1, 2)),)

    def load(requests: list[Request], *_: Any) -> Backbone:
        toy.loaded += 1
        specs = [
            {
                "backbone": request.backbone,
                "weights": request.weights,
                "layer": request.layer,
                "decode": images.POLICY,
            }
            for request in requests
        ]
        run = forward.Forward(Mean(), torch.device("cpu"), forward.BATCH["cpu"])
        return Backbone(specs, [3], "fp32", lambda image: np.asarray(image.resize((8, 8))), run)

    monkeypatch.setattr(backbones, "load", load)
    return toy


@pytest.fixture
def paths(photos: Path) -> list[str]:
    """Those of `photos`, sorted."""
    return sorted(map(str, photos.rglob("*.png")))


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a backbone had."""
    calls, run = list[int](), Forward.__call__

    def tallied(self: Forward, images: NDArray[np.uint8]) -> Any:
        calls.append(len(images))
        return run(self, images)

    monkeypatch.setattr(Forward, "__call__", tallied)
    return calls


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was loaded, from nothing at the start; none of it stays."""
    readthrough._loaded.clear()
    calls, load = list[Any](), backbones.load

    def tallied(*arguments: Any) -> Any:
        calls.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(backbones, "load", tallied)
    yield calls
    readthrough._loaded.clear()


@pytest.fixture
def permafrost(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in this process: to start one of its own takes longer than most of what is tested."""

    def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = ["permafrost", *map(str, arguments)]
        capfd.readouterr()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # As Python starts, not as pytest has it.
            warnings.resetwarnings()
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            patch.setattr(sys, "argv", words)
            patch.setenv("OMP_WAIT_POLICY", "passive")
            # A thread that an earlier test left hanging must not end the tests.
            patch.setattr(os, "_exit", sys.exit)
            patch.chdir(cwd or Path.cwd())
            with pytest.raises(SystemExit) as end:
                cli.main()
        done = subprocess.CompletedProcess(words, int(end.value.code or 0), *capfd.readouterr())
        assert done.returncode == code, f"exit {done.returncode}: {done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a process of its own."""

    def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
        )
        assert done.returncode == code, f"exit {done.returncode}: {done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server answers that acts like S3."""
    yield from serving(tmp_path_factory.mktemp("moto") / "log")


def serving(log: Path, **environment: str) -> Iterator[str]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
    try:
        patience = time.monotonic() + 60
        while not (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < patience, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket's URL, in an environment that reaches nothing else."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_S3"))]:
        monkeypatch.delenv(name)
    environment = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    environment |= {"AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()
    name = f"test-{uuid.uuid4().hex}"
    fs.mkdir(name)
    yield f"s3://{name}"
    type(fs).clear_instance_cache()


def colours(paths: list[str]) -> list[str]:
    """The labels of `paths`: the folders' names."""
    return [Path(path).parent.name for path in paths]


def searched(step: Any, **options: Any) -> GridSearchCV:
    """A search for the strength of a logistic regression behind a first step."""
    pipe = Pipeline([("images", step), ("head", LogisticRegression(max_iter=1000))])
    return GridSearchCV(pipe, {"head__C": [0.01, 0.1, 1.0]}, cv=5, error_score="raise", **options)


def stored(store: FeatureStore, view: View) -> dict[str, NDArray[np.float32]]:
    """Every embedding of a view by SHA-256."""
    found: dict[str, NDArray[np.float32]] = {}
    for _, keys, vectors in parts.each(store.root, view):
        for key, vector in zip(keys, vectors, strict=True):
            found.setdefault(key, vector)
    return found


def peak_memory(*arguments: object) -> int:
    """Run the command as a process, and tell the most bytes it held; `ru_maxrss` would count those of its parent."""
    child, most = subprocess.Popen([sys.executable, "-m", "pipeline.cli", *map(str, arguments)]), 0
    while child.poll() is None:
        told = Path(f"/proc/{child.pid}/status").read_text()
        most = max(most, *(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.02)
    assert child.returncode == 0
    return most


def predicted(bundle: Bundle, store: FeatureStore, out: Path) -> pd.DataFrame:
    """What a bundle says of a store."""
    predict.predict_store(bundle, store, out)
    return pd.read_parquet(out)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON object on stdout."""
    return json.loads(done.stdout)
