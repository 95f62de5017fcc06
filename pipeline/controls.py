"""Controls: what a score is worth that knows the files but no image, the pixels but no backbone, or no training."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from features import reading
from features.extract import extract
from features.sources import Source
from features.store import FeatureStore
from features.views import AUTO, UNTRAINED, View
from pipeline.folds import SEED

MOST_IMAGES = 1000
"""That are read again for `pixels` and `untrained`."""
SIDE = 8


def file_facts(samples: pd.DataFrame) -> NDArray[np.float32]:
    """What a listing tells of each file: sides, bytes and format; a label that follows from them is a leak.

    Returns
    -------
    numpy.ndarray
        float32, shape (samples, 5 + formats).
    """
    width, height, size = (samples[name].to_numpy(np.float64) for name in ("width", "height", "bytes"))
    formats = pd.get_dummies(samples["format"]).to_numpy(np.float64)
    columns = [width, height, width / height, np.log(size), size / (width * height), *formats.T]
    return np.stack(columns, axis=1).astype(np.float32)


def bounded(samples: pd.DataFrame) -> NDArray[np.int64]:
    """Rows of at most `MOST_IMAGES` samples, drawn at random."""
    drawn = np.random.default_rng(SEED).permutation(len(samples))[:MOST_IMAGES]
    return np.sort(drawn).astype(np.int64)


def pixels(samples: pd.DataFrame) -> NDArray[np.float32]:
    """Raw image statistics: an 8 x 8 thumbnail, and the mean, deviation and extremes of each channel.

    Returns
    -------
    numpy.ndarray
        float32, shape (samples, 204); NaN where an image cannot be read any more.
    """
    found = np.full((len(samples), SIDE * SIDE * 3 + 12), np.nan, np.float32)
    for row, told in enumerate(reading.read_all(samples["uri"].tolist(), lambda key: {"pixels": (_statistics, True)})):
        if "pixels" in told.pixels and told.facts["sha256"] == samples["sha256"].iloc[row]:
            found[row] = told.pixels["pixels"]
    return found


def untrained(samples: pd.DataFrame, view: View, device: str) -> NDArray[np.float32]:
    """Embeddings by the same backbone, layer and transform with random weights.

    Returns
    -------
    numpy.ndarray
        float32, shape (samples, dim); NaN where an image cannot be read any more.
    """
    ids = [f"{place:09d}" for place in range(len(samples))]
    columns: dict[str, Any] = {"id": ids, "uri": samples["uri"].tolist(), "version": [""] * len(ids)}
    listing = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    source = Source("controls", listing, "", whole=True)
    request = replace(view.request, weights=UNTRAINED, weights_sha256=None, precision=AUTO)
    found = np.full((len(samples), view.dim), np.nan, np.float32)
    with tempfile.TemporaryDirectory(prefix="permafrost-") as scratch:
        store = FeatureStore.open_or_new(os.path.join(scratch, "store"))
        extract(source, store, [request], view="untrained", device=device)
        keys, matrix, told = store.load("untrained")
    rows = np.asarray(keys, dtype=np.int64)
    same = (told["sha256"].to_numpy() == samples["sha256"].to_numpy()[rows]).astype(bool)
    found[rows[same]] = matrix[same]
    return found


def _statistics(image: Image.Image) -> NDArray[np.float32]:
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    whole = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    measures = [whole.mean(axis=0), whole.std(axis=0), whole.min(axis=0), whole.max(axis=0)]
    return np.concatenate([small.ravel(), *measures]).astype(np.float32)
