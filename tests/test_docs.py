"""The reference: what is public says what it takes, gives and raises, and has an example that does as it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import COLOURS, draw
from features import errors
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline.dataset import Selection
from pipeline.train import train

ROOT = Path(__file__).parents[1]
MODULES = sorted(f"{path.parent.name}.{path.stem}" for path in ROOT.glob("[fp]*/*.py") if path.stem != "__init__")
PUBLIC = {
    "features.export": ["export"],
    "features.extract": ["extract", "preview"],
    "features.info": ["describe"],
    "features.shards": ["Shard.parse"],
    "features.sources": ["list_source"],
    "features.upkeep": ["compact", "vacuum"],
    "features.verify": ["verify"],
    "features.views": ["Request", "Request.parse"],
    "pipeline.bundle": ["load"],
    "pipeline.compare": ["compare"],
    "pipeline.conformal": ["ranges", "sets", "threshold"],
    "pipeline.dataset": ["Selection"],
    "pipeline.demo": ["write_digits"],
    "pipeline.drift": ["compare", "oddity", "reference"],
    "pipeline.duplicates": ["near_duplicates"],
    "pipeline.explore": ["clustered", "explore"],
    "pipeline.heads": ["make", "names_for"],
    "pipeline.intervals": ["difference", "scores"],
    "pipeline.metrics": ["Predictions"],
    "pipeline.predict": ["in_words", "predict_source", "predict_store", "require_alike"],
    "pipeline.train": ["train"],
    "pipeline.transformer": ["BackboneTransformer"],
}
STORE = ["is_store", "iter_batches", "load", "open", "open_or_new", "pick_view", "snapshot", "views"]
"""Methods of the store, which share the example of their class."""
NAMES = [f"{module}.{name}" for module, names in PUBLIC.items() for name in names]
EXAMPLE = re.compile(r"^Examples\n-+\n(?:.|\n)*^>>> ", re.MULTILINE)
FLAGS = doctest.ELLIPSIS


def found(name: str) -> Any:
    module = next(module for module in PUBLIC if name.startswith(f"{module}."))
    thing: Any = importlib.import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        thing = getattr(thing, part)
    return thing


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    every = [test for module in MODULES for test in finder.find(importlib.import_module(module), module)]
    return [test for test in every if test.examples]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples find around them: 24 drawn images and a table of them, a store, a bundle."""
    folder = tmp_path_factory.mktemp("examples")
    random = np.random.default_rng(0)
    files = []
    for number in range(24):
        label = list(COLOURS)[number % 3]
        files.append(f"{'test' if number >= 18 else 'train'}/{label}/{number:02d}.png")
        draw(folder / "photos" / files[-1], COLOURS[label], random)
    table = pd.DataFrame({"number": range(24), "file": files, "label": [file.split("/")[1] for file in files]})
    table.assign(weight=table["number"] * 0.5).to_csv(folder / "photos.csv", index=False)
    before = Path.cwd()
    os.chdir(folder)
    try:
        store = FeatureStore.open_or_new("store")
        extract(list_source("photos"), store, [Request.parse("tiny")])
        train(store, "label", Path("bundle"), selection=Selection(split="split"), folds=3, with_images=False)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def around(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that folder; what an example leaves there is removed."""
    monkeypatch.chdir(filled)
    before = set(filled.iterdir())
    yield
    for path in set(filled.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_does_as_it_says(example: doctest.DocTest, around: None) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_public_is_explained(name: str) -> None:
    thing = found(name)
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        assert re.search(r"^(Parameters|Attributes)\n-", text, re.MULTILINE), "no word on what it holds"
    assert EXAMPLE.search(text), "no example"
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    takes = [each for each in signature.parameters if each not in ("self", "cls")]
    listed = text.partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    told = [line.partition(" : ")[0] for line in listed.splitlines() if not line.startswith(" ")]
    assert ", ".join(told).split(", ") == takes or not takes
    source, gives = inspect.getsource(thing), str(signature.return_annotation)
    if gives not in ("None", "FeatureStore", "Request", "Shard", "View", "bool"):
        assert re.search(r"^(Returns|Yields)\n-", text, re.MULTILINE), "no word on what it gives"
    said = text.partition("Examples\n---")[0]
    untold = [kind for kind in re.findall(r"^\s+raise (\w+)", source, re.MULTILINE) if kind not in said]
    assert not untold, "no word on what it raises"
    if "NDArray" in f"{signature}" or "Matrix" in f"{signature}":
        assert "shape (" in said, "no shapes"


@pytest.mark.parametrize("name", STORE)
def test_the_store_is_explained(name: str) -> None:
    example = (inspect.getdoc(FeatureStore) or "").partition("Examples\n")[2]
    assert f".{name}(" in example
    method = getattr(FeatureStore, name)
    raised = re.findall(r"^\s+raise (\w+)", inspect.getsource(method), re.MULTILINE)
    assert not [kind for kind in raised if kind not in (inspect.getdoc(method) or "")]


def test_every_error_that_is_named_exists() -> None:
    known = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    for name in NAMES:
        raised = (inspect.getdoc(found(name)) or "").partition("Raises\n------\n")[2].partition("\n\n")[0]
        assert {line for line in raised.splitlines() if line and not line.startswith(" ")} <= known, name


@pytest.mark.slow
def test_the_reference_is_built(tmp_path: Path) -> None:
    command = re.search(r"^docs:.*\n\t\$\(BIN\)/(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command
    words = command[1].replace("docs-build", str(tmp_path)).split()
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in MODULES:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file(), module
    page = (tmp_path / "features/store.html").read_text()
    assert "iter_batches" in page and "float32" in page
    assert str(ROOT) not in page
