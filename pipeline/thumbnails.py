"""Samples become small pictures that stand inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from features import reading
from features.embedding import Progress

SIDE = 144
"""Of the longer side of a picture, in pixels: sharp where a gallery draws it at 120 pixels."""
TILE = 64
"""Of a tile of a sheet, which is drawn at 96."""
COLUMNS = 32
QUALITY = 72

Thumbnails = dict[int, Image.Image]


def read(samples: pd.DataFrame, rows: Iterable[int], progress: Progress = lambda done, total, busy: None) -> Thumbnails:
    """Read some samples again, in threads.

    Parameters
    ----------
    samples : pandas.DataFrame
    rows : iterable of int
        Places in it.
    progress : callable, optional

    Returns
    -------
    dict of int to PIL.Image.Image
        By place; an image that cannot be read any more, or is another one by now, is missing.
    """
    wanted = sorted(set(rows))
    uris = samples["uri"].iloc[wanted].tolist()
    found: Thumbnails = {}
    for done, told in enumerate(reading.read_all(uris, lambda key: {"small": (_small, True)})):
        row = wanted[done]
        if "small" in told.pixels and told.facts["sha256"] == samples["sha256"].iloc[row]:
            found[row] = told.pixels["small"]
        progress(done + 1, len(wanted), "")
    return found


def data_uri(image: Image.Image) -> str:
    """A picture as a URL that holds it."""
    image.save(sink := io.BytesIO(), "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"


def sheet(images: list[Image.Image | None]) -> str:
    """Many pictures as one, in rows of `COLUMNS` square tiles; as a URL that holds it."""
    height = -(-len(images) // COLUMNS) * TILE
    drawn = Image.new("RGB", (COLUMNS * TILE, max(height, TILE)), (128, 128, 128))
    for place, image in enumerate(images):
        if image is not None:
            tile = image.resize((TILE, TILE), Image.Resampling.BILINEAR, box=_middle(image))
            drawn.paste(tile, (place % COLUMNS * TILE, place // COLUMNS * TILE))
    return data_uri(drawn)


def tiny_pixels(image: Image.Image) -> NDArray[np.float32]:
    """Sixteen by sixteen colours, centred and of length one; float32 of shape (16, 16, 3)."""
    small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
    # Each colour by itself: what is of one tint is not yet alike.
    small -= small.mean(axis=(0, 1))
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6), np.float32)


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


def _middle(image: Image.Image) -> tuple[float, float, float, float]:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side
