"""A matrix that memory does not hold: in a file, its rows drawn into blocks at random, and read block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features import parts
from features.files import Root
from features.views import View

BLOCK_BYTES = 2**25
SEED = 0

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Some rows of a float32 matrix in a file.

    Each block is a random sample of the rows, so that heads which learn block by block never see one class for long,
    as they would in the order of a listing.

    Attributes
    ----------
    file : file object
        Binary; read by place, so that threads may share it.
    dim : int
        Columns.
    stored : numpy.ndarray
        int64, shape (rows in the file,): which row of this matrix each is, or -1.
    count : int
        Rows of this matrix.
    """

    file: BinaryIO
    dim: int
    stored: Rows
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: NDArray[Any]) -> Blocks:
        """Some of the rows, in another order if need be; nothing is read."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        place = np.full(self.count + 1, -1)
        place[rows] = np.arange(len(rows))
        return replace(self, stored=place[self.stored], count=len(rows))

    def __iter__(self) -> Iterator[tuple[Rows, Matrix]]:
        """Read the matrix: places of some rows, ascending, and the rows."""
        size, most = 4 * self.dim, rows_in_block(self.dim)
        for start in range(0, len(self.stored), most):
            rows = self.stored[start : start + most]
            order = np.argsort(rows)[np.count_nonzero(rows < 0) :]
            if len(order):
                content = os.pread(self.file.fileno(), len(rows) * size, start * size)
                yield rows[order], np.frombuffer(content, np.float32).reshape(-1, self.dim)[order]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Matrix:
        """Read all rows into memory, for a matrix of few."""
        found = np.empty((self.count, self.dim), np.float32)
        for rows, some in self:
            found[rows] = some
        return found


def rows_in_block(dim: int) -> int:
    """How many rows of so many columns are read at once."""
    return max(1, BLOCK_BYTES // (4 * dim))


def of(X: Matrix | Blocks) -> Iterator[tuple[Any, Matrix]]:
    """Places of rows, and the rows, of whatever kind of matrix."""
    return iter(X if isinstance(X, Blocks) else [(slice(None), X)])


def write(root: Root, view: View, wanted: pa.ChunkedArray, file: BinaryIO) -> tuple[NDArray[np.bool_], Blocks]:
    """Copy the embeddings of some images into a file, in one pass over a view's parts.

    Which rows a block holds depends on `wanted` alone, not on the parts.

    Parameters
    ----------
    root : Root
    view : View
    wanted : pyarrow.ChunkedArray
        SHA-256 of the images.
    file : file object
        Empty and binary; takes ``4 * images * dim`` bytes.

    Returns
    -------
    found : numpy.ndarray
        bool, shape (images,): what the view has.
    blocks : Blocks
        A row for each image; those that were not found must not be asked for.
    """
    size, most = 4 * view.dim, rows_in_block(view.dim)
    block = np.random.default_rng(SEED).permutation(len(wanted)) // most
    free = np.arange(0, len(wanted), most)
    stored = np.full(len(wanted), -1)
    if hasattr(os, "posix_fallocate"):
        # So that a disk without the space says so before the work.
        os.posix_fallocate(file.fileno(), 0, max(1, len(wanted) * size))
    for rows, vectors in parts.join(root, view, wanted):
        order = np.argsort(block[rows], kind="stable")
        numbers, starts = np.unique(block[rows[order]], return_index=True)
        for number, some in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            start, free[number] = int(free[number]), free[number] + len(some)
            os.pwrite(file.fileno(), vectors[some].tobytes(), start * size)
            stored[start : start + len(some)] = rows[some]
    found = np.zeros(len(wanted), bool)
    found[stored[stored >= 0]] = True
    return found, Blocks(file, view.dim, stored, len(wanted))
