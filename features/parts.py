"""A view's embeddings: parts that are added and never changed, and how they are read.

Whoever compacts a view writes first and deletes after. A reader that misses a part therefore lists again, and of the
doubles that it may meet the first counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.errors import StoreError
from features.files import Root, stamp
from features.pages import read_vectors
from features.parquet import encode_part, open_file
from features.views import View

FORMAT = 1
"""Of everything under a store's root. Raise it when an older reader would misread or miss a row; keep reading the
older ones, and keep a store of each in the tests."""
ROWS = 8192
"""At most so many images are joined at a time, however many of them are the same."""


@dataclass
class Present:
    """Which images a view has embeddings of, as far as its parts have been looked at."""

    sha256: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)


def names(root: Root, view: View) -> list[str]:
    """File names of a view's parts, oldest first."""
    return [name for name in root.names(f"embeddings/{view.name}") if name.endswith(".parquet")]


def look(root: Root, view: View, present: Present) -> None:
    """Bring `present` up to date with the parts of a view; only new parts are read, and of those only the keys."""
    for name, sha256 in keys(root, view, present.parts):
        present.sha256.update(sha256.to_pylist())
        present.parts.add(name)


def add(
    root: Root,
    view: View,
    sha256: list[str],
    embeddings: NDArray[np.float32],
    present: Present,
    versions: dict[str, str],
) -> int:
    """Add the embeddings that a view does not have by now, as one part.

    Parameters
    ----------
    root : Root
    view : View
    sha256 : list of str
        One per row, without doubles.
    embeddings : numpy.ndarray
        float32, shape (rows, dim).
    present : Present
        Brought up to date, the new part included.
    versions : dict of str to str
        Versions of the libraries that computed them.

    Returns
    -------
    int
        How many rows were written.
    """
    look(root, view, present)
    new = [row for row, key in enumerate(sha256) if key not in present.sha256]
    if not new:
        return 0
    keys = [sha256[row] for row in new]
    present.parts.add(write(root, view, keys, embeddings[new], versions))
    present.sha256.update(keys)
    return len(new)


def write(root: Root, view: View, sha256: list[str], embeddings: NDArray[np.float32], versions: dict[str, str]) -> str:
    """Write one part; returns its name."""
    content = encode_part(sha256, embeddings, {"format": FORMAT, "fingerprint": view.fingerprint, "versions": versions})
    name = f"{stamp()}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    root.create(f"embeddings/{view.name}/{name}", content)
    return name


def gather(root: Root, view: View, wanted: pa.ChunkedArray) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Read the embeddings of some images, in their order.

    Parameters
    ----------
    root : Root
    view : View
    wanted : pyarrow.ChunkedArray
        SHA-256 of the images; may repeat itself, and nulls are not found.

    Returns
    -------
    found : numpy.ndarray
        bool, shape (images,): what the view has.
    embeddings : numpy.ndarray
        float32, shape (images, dim); where nothing was found, anything.
    """
    out, found = np.empty((len(wanted), view.dim), np.float32), np.zeros(len(wanted), bool)
    while True:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(_scatter, root, view, name, target, out, found)
                for name, target in _targets(root, view, wanted, found)
            ]
        if not any(job.result() for job in jobs):
            break
    # Where a key repeats itself, only its first row was filled.
    if len(again := np.flatnonzero(~found)):
        first = _places(wanted.take(pa.array(again)), wanted)
        out[again], found[again] = out[first], (first >= 0) & found[first]
    return found, out


def scan(root: Root, view: View, wanted: pa.ChunkedArray) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Read the embeddings of some images row group by row group; of what memory holds, only the keys are many.

    Parameters
    ----------
    root : Root
    view : View
    wanted : pyarrow.ChunkedArray
        SHA-256 of the images; nulls are not found.

    Yields
    ------
    rows : numpy.ndarray
        int64: some of the images. Each that the view has an embedding of comes once, by the first row that is its.
    embeddings : numpy.ndarray
        float32, shape (rows, dim).
    """
    found, vanished = np.zeros(len(wanted), bool), True
    while vanished:
        vanished = False
        for name, target in _targets(root, view, wanted, found):
            try:
                for rows, vectors in _groups(root, view, name, target):
                    found[rows] = True
                    yield rows, vectors.view(np.float32)
            except FileNotFoundError:
                vanished = True


def _targets(
    root: Root, view: View, wanted: pa.ChunkedArray, found: NDArray[np.bool_]
) -> list[tuple[str, NDArray[np.int64]]]:
    """By part: which of the images not found yet each row is, else -1; parts without any are left out."""
    parts = list(keys(root, view))
    place = _places(pa.chunked_array([chunk for _, some in parts for chunk in some.chunks], pa.string()), wanted)
    # Of doubles the first counts, and what was found before a part vanished stays; the last slot is for -1.
    at, first = np.arange(len(place)), np.empty(len(wanted) + 1, np.int64)
    first[place[::-1]] = at[::-1]
    target = np.where((first[place] == at) & ~np.append(found, True)[place], place, -1)
    ends = np.cumsum([len(some) for _, some in parts], dtype=np.int64)
    targets = np.split(target, ends[:-1]) if parts else []
    return [(name, some) for (name, _), some in zip(parts, targets, strict=True) if (some >= 0).any()]


def _groups(
    root: Root, view: View, name: str, target: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Read those row groups of a part in which a row has a target: the targets, and their vectors as bytes."""
    end = 0
    with opened(root, view, name) as (file, part, _):
        for group in range(part.num_row_groups):
            start, end = end, end + part.metadata.row_group(group).num_rows
            to = target[start:end]
            if (here := to >= 0).any():
                vectors = read_vectors(file, part, group, view.dim)
                yield to[here], vectors if here.all() else vectors[here]


def _places(keys: pa.ChunkedArray, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where each key first stands among others, or -1."""
    found = pc.index_in(keys, value_set=among.combine_chunks(), skip_nulls=True)
    places: NDArray[np.int64] = found.fill_null(-1).to_numpy().astype(np.int64)
    return places


def _scatter(
    root: Root, view: View, name: str, target: NDArray[np.int64], out: NDArray[np.float32], found: NDArray[np.bool_]
) -> bool:
    """Put a part's vectors into rows of `out`; returns whether the part is gone."""
    rows = out.view(np.uint8)
    try:
        for to, vectors in _groups(root, view, name, target):
            rows[to] = vectors
            found[to] = True
    except FileNotFoundError:
        return True
    return False


def join(root: Root, view: View, wanted: pa.ChunkedArray) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Read the embeddings of some images part by part, since memory may not hold them all.

    Parameters
    ----------
    root : Root
    view : View
    wanted : pyarrow.ChunkedArray
        SHA-256 of the images; may repeat itself, and nulls are not found.

    Yields
    ------
    rows : numpy.ndarray
        int64, ascending: some of the images. Each that the view has an embedding of comes once.
    embeddings : numpy.ndarray
        float32, shape (rows, dim).
    """
    codes, unique = pd.factorize(wanted.to_pandas().to_numpy(object))
    # One index for all parts; Arrow would make a new one for each of them, from a million keys every time.
    index, order = pd.Index(unique, dtype=object), np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(unique) + 1))
    for _, sha256, vectors in each(root, view):
        code = index.get_indexer(pd.Index(sha256, dtype=object))
        have = np.flatnonzero(code >= 0)
        counts = starts[code[have] + 1] - starts[code[have]]
        # The rows of one image lie side by side in `order`.
        ends = np.cumsum(counts)
        rows = order[np.arange(counts.sum()) + np.repeat(starts[code[have]] - ends + counts, counts)]
        # A part that another program wrote may hold doubles.
        rows, first = np.unique(rows, return_index=True)
        place = np.repeat(have, counts)[first]
        for start in range(0, len(rows), ROWS):
            yield rows[start : start + ROWS], vectors[place[start : start + ROWS]]


def each(root: Root, view: View) -> Iterator[tuple[str, list[str], NDArray[np.float32]]]:
    """Read a view part by part, without doubles: name, SHA-256, and float32 of shape (images, dim)."""
    done, seen = set[str](), set[str]()
    while True:
        vanished = False
        for name in names(root, view):
            if name in done:
                continue
            try:
                keys, vectors = read(root, view, name)
            except FileNotFoundError:
                vanished = True
                continue
            done.add(name)
            new = [row for row, key in enumerate(keys) if key not in seen]
            seen.update(keys)
            if new:
                yield name, [keys[row] for row in new], vectors if len(new) == len(keys) else vectors[new]
        if not vanished:
            return


def read(root: Root, view: View, name: str) -> tuple[list[str], NDArray[np.float32]]:
    """Read one part: SHA-256, and float32 of shape (images, dim)."""
    with opened(root, view, name) as (file, part, _):
        keys = part.read(["sha256"], use_threads=False)["sha256"].to_pylist()
        groups = [read_vectors(file, part, group, view.dim) for group in range(part.num_row_groups)]
        return keys, np.concatenate(groups).view(np.float32).reshape(len(keys), view.dim)


def keys(root: Root, view: View, known: AbstractSet[str] = frozenset()) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Name and SHA-256 of each part that is not known yet."""
    done = set(known)
    while True:
        vanished = False
        for name in names(root, view):
            if name in done:
                continue
            try:
                with opened(root, view, name, ["sha256"]) as (_, part, _meta):
                    keys = part.read(["sha256"], use_threads=False)["sha256"]
            except FileNotFoundError:
                vanished = True
                continue
            done.add(name)
            yield name, keys
        if not vanished:
            return


@contextmanager
def opened(
    root: Root, view: View, name: str, columns: list[str] | None = None
) -> Iterator[tuple[pa.NativeFile, pq.ParquetFile, dict[str, object]]]:
    """Open a part, or of a part on an object store some columns: its file, what Arrow makes of it, and its facts.

    Raises
    ------
    FileNotFoundError
        If it is gone, which compaction may do at any moment.
    StoreError
        If it is damaged, of a newer format, or of another view.
    """
    where = f"part {name} of view {view.name!r}"
    try:
        with root.open_native(f"embeddings/{view.name}/{name}", columns) as file:
            part, meta = open_file(file)
            if meta["format"] > FORMAT:
                raise StoreError(f"{where} has format {meta['format']}, this permafrost reads up to {FORMAT}")
            if meta["fingerprint"] != view.fingerprint:
                raise StoreError(f"{where} holds embeddings of another view; remove it")
            yield file, part, meta
    except (pa.ArrowException, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        # Arrow tells of a wrong checksum by an OSError too, but without a number.
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno):
            raise
        raise StoreError(f"{where} is damaged ({error}); remove it, and the next run makes it anew") from None
