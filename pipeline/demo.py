"""The whole job on data that is at hand everywhere: scikit-learn's digits and the backbone in the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from features.embedding import Progress
from features.errors import DataError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import bundle, predict
from pipeline.dataset import Selection
from pipeline.train import train

PIXELS = 64
TEST_EVERY = 5
FILES = ("digits", "store", "bundle", "predictions.parquet")


def write_digits(folder: Path) -> int:
    """Write scikit-learn's 1,797 handwritten digits as ``<split>/<digit>/<number>.png``; returns how many.

    The data set has no split of its own by writer; every fifth digit goes to the test.

    Parameters
    ----------
    folder : pathlib.Path

    Returns
    -------
    int

    Examples
    --------
    >>> write_digits(Path("digits"))
    1797
    """
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % TEST_EVERY == 0 else "train"
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ink on paper: the digits come as 8 x 8 grey values from 0 to 16, light on dark.
        grey = Image.fromarray(np.round(255 - image * (255 / 16)).astype(np.uint8))
        grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)
    return len(digits.target)


def run(out: Path, progress: Progress, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Write the digits, embed them, train a head, predict the test images; say each step as a command.

    Returns
    -------
    facts : dict
        The content of `bundle.json`.
    predictions : pathlib.Path

    Raises
    ------
    DataError
        If anything but an earlier demo is there.
    """
    there = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    if there - set(FILES) or (there and "digits" not in there) or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} holds something else than an earlier demo; name a new folder with --out")
    images, store, trained, predictions = (out / name for name in FILES)
    say(f"{write_digits(images):,} handwritten digits in {images}")
    say(f"$ permafrost extract {images} --store {store} --backbone tiny")
    feature_store = FeatureStore.open_or_new(str(store))
    extract(list_source(str(images)), feature_store, [Request.parse("tiny")], progress=progress)
    say(f"$ permafrost train {store} --target label --split split --out {trained}")
    facts = train(feature_store, "label", trained, selection=Selection(split="split"))
    say(f"$ permafrost predict {trained} {images}/test --store {store} --out {predictions}")
    predict.predict_source(bundle.load(trained), list_source(str(images / "test")), predictions, store=feature_store)
    return facts, predictions
