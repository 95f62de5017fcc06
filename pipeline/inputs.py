"""Whatever users pass as images to an estimator: a grid of cells, and the bytes that each cell stands for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from features import images, locations
from features.errors import ImageError, InputError, redacted

TAKEN = "paths, URLs, bytes, PIL images or uint8 arrays of shape (height, width, 3)"

Cells = NDArray[np.object_]

# An image that PIL has opened but not read cannot be read by two threads; each image always gets the same lock.
_READING = [Lock() for _ in range(61)]


def cells(X: Any) -> Cells:
    """Lay out what a user passes in rows and image columns.

    Parameters
    ----------
    X : list, numpy.ndarray, Series, DataFrame, pyarrow.ChunkedArray or pyarrow.Table
        A column of images; or several, as lists of equal length, an array of shape (rows, columns) or a frame of pandas
        or Polars; or a uint8 array of shape (images, height, width, channels).

    Returns
    -------
    numpy.ndarray
        Objects, shape (rows, columns).

    Raises
    ------
    InputError
        If it is anything else, or has no row or no column.
    """
    columns = _columns(X)
    shape = (len(columns[0]) if columns else 0, len(columns))
    if 0 in shape:
        what = "sample" if columns else "feature"
        raise InputError(f"found 0 {what}(s) (shape={shape}) while a minimum of 1 is required; pass {TAKEN}")
    grid = np.empty(shape, object)
    # One by one, since numpy would take arrays apart.
    for place, column in enumerate(columns):
        for row, cell in enumerate(column):
            grid[row, place] = cell
    return grid


def _columns(X: Any) -> list[list[Any]]:
    if isinstance(X, np.ndarray):
        return _columns_of_array(X)
    if isinstance(X, pd.DataFrame):
        return [X.iloc[:, place].tolist() for place in range(X.shape[1])]
    if isinstance(X, pa.Table):
        return [column.to_pylist() for column in X.columns]
    if isinstance(X, pa.Array | pa.ChunkedArray):
        return [X.to_pylist()]
    if hasattr(X, "iter_columns"):  # A frame of Polars.
        return [column.to_list() for column in X.iter_columns()]
    if hasattr(X, "to_list"):  # A Series of either.
        return [X.to_list()]
    if not isinstance(X, list | tuple):
        raise InputError(f"X is one {type(X).__name__}; pass a list, array, Series or DataFrame of {TAKEN}")
    if not X or not all(isinstance(row, list | tuple) for row in X):
        return [list(X)]
    widths = {len(row) for row in X}
    if len(widths) > 1:
        raise InputError(f"the rows of X have from {min(widths)} to {max(widths)} images; fill short ones up with None")
    return [list(column) for column in zip(*X, strict=True)]


def _columns_of_array(X: NDArray[Any]) -> list[list[Any]]:
    if X.dtype.kind in "OUT" and X.ndim in (1, 2):
        return [list(column) for column in (X[None] if X.ndim == 1 else X.T)]
    if X.dtype == np.uint8 and X.ndim == 4:
        return [list(X)]
    # Arrays of bytes are no better: numpy cuts zeros off the end of each.
    raise InputError(
        f"X is an array of {X.dtype} with shape {X.shape}; pass {TAKEN}, as a list, an array of str or objects, or a "
        "uint8 array of shape (images, height, width, 3)"
    )


@dataclass(frozen=True)
class Images:
    """Where the bytes of each cell are.

    Attributes
    ----------
    places : list of (str or None)
        For each cell, row by row, a path or URL, or the key of what is held in memory; None where no image is.
    held : dict
        What is held in memory, by key. No path has such a key, since it begins with NUL.
    """

    places: list[str | None]
    held: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, grid: Cells) -> Images:
        """Tell what the cells of a grid are.

        Raises
        ------
        InputError
            If one is no image, with its row.
        """
        found = cls([])
        for number, cell in enumerate(grid.flat):
            try:
                found.places.append(None if is_missing(cell) else found._place(cell))
            except InputError as error:
                row, column = divmod(number, grid.shape[1])
                where = f"row {row} of column {column}" if grid.shape[1] > 1 else f"row {row}"
                raise InputError(f"{where} {error}; images are {TAKEN}") from None
        return found

    def _place(self, cell: Any) -> str:
        if isinstance(cell, str | os.PathLike):
            path = os.fsdecode(cell)
            if path.startswith("\0"):
                raise InputError("is a text that begins with NUL")
            try:
                path.encode(errors="surrogateescape")
            except UnicodeEncodeError:
                raise InputError("is a text that is not Unicode") from None
            return locations.as_uri(path)
        key = f"\0{id(cell)}"
        if isinstance(cell, bytes | bytearray | memoryview | Image.Image):
            self.held[key] = cell
        elif isinstance(cell, np.ndarray):
            if cell.dtype != np.uint8 or cell.ndim not in (2, 3) or (cell.ndim == 3 and cell.shape[2] not in (1, 3, 4)):
                raise InputError(f"is an array of {cell.dtype} with shape {cell.shape}")
            self.held[key] = cell
        else:
            raise InputError(f"is of type {type(cell).__name__}: {f'{cell!r}'[:40]}")
        return key

    def read(self, place: str) -> bytes:
        """The bytes of an image file, as it is or as `features.images.as_file` makes it of pixels.

        Raises
        ------
        ImageError
            If it cannot be read.
        """
        held = self.held.get(place)
        if held is None:
            return locations.read(place)
        if isinstance(held, np.ndarray):
            if not held.size:
                raise ImageError("empty", "the array has no pixel")
            held = Image.fromarray(held[..., 0] if held.ndim == 3 and held.shape[2] == 1 else held)
        if not isinstance(held, Image.Image):
            return bytes(held)
        with _READING[id(held) // 16 % len(_READING)]:
            return images.as_file(held)

    def shown(self, number: int) -> str:
        """What stands in a cell, in brackets, for a message."""
        place = self.places[number]
        if place is None:
            return ""
        return f" ({type(self.held[place]).__name__ if place in self.held else redacted(place)})"


def is_missing(cell: Any) -> bool:
    """Whether a cell stands for no image: None, NaN, or what pandas has for them."""
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float | np.floating) and cell != cell)
