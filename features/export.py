"""Export: samples and embeddings joined into one flat table, for tools that shall not need the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import parts, samples
from features.errors import DataError
from features.guards import require_folder
from features.store import FeatureStore
from features.views import View

Format = Literal["parquet", "csv", "arrow"]


def export(store: FeatureStore, view: View, out: Path, format: Format, wide: bool) -> int:
    """Write every sample of the newest snapshot, with its embedding if the view has it; returns how many.

    Samples come in the order of the view's parts; those without an embedding come last, with nulls.

    Parameters
    ----------
    store : FeatureStore
    view : View
    out : pathlib.Path
        Written whole or not at all.
    format : str
        ``parquet``, ``csv``, where nested values are text such as ``[0.1, 0.25]``, or ``arrow``, an IPC file.
    wide : bool
        One column ``embedding_0`` and so on for each dimension, instead of one list.

    Returns
    -------
    int

    Raises
    ------
    DataError
        If `out` cannot be a file, or a source's own column has the name of one of `wide`.

    Examples
    --------
    >>> import pandas as pd
    >>> from features.store import FeatureStore
    >>> store = FeatureStore.open("store")
    >>> export(store, store.pick_view(), Path("images.parquet"), "parquet", wide=False)
    24
    >>> len(pd.read_parquet("images.parquet")["embedding"][0])
    1280
    """
    require_file(out)
    listing = store.snapshot().samples
    names = [f"embedding_{place}" for place in range(view.dim)] if wide else ["embedding"]
    clash = {name.lower() for name in names} & {name.lower(): name for name in samples.own_columns(listing)}.keys()
    if clash:
        raise DataError(f"the sources have a column {min(clash)!r} of their own; rename it, or export without --wide")
    types = [pa.float32()] * view.dim if wide else [pa.list_(pa.float32(), view.dim)]
    fields = [listing.schema.field(name) for name in listing.column_names]
    schema = pa.schema([*fields, *(pa.field(name, kind) for name, kind in zip(names, types, strict=True))])
    with whole_table(out, schema, format, listing.column_names) as write:
        for rows, vectors in _joined(store, view, listing):
            columns = listing.take(pa.array(rows)).columns + _columns(vectors, len(rows), types)
            write(pa.table(columns, schema=schema))
    return len(listing)


@contextmanager
def whole_table(
    out: Path, schema: pa.Schema, format: Format, repeated: list[str]
) -> Iterator[Callable[[pa.Table], None]]:
    """A file that is there once all of its rows are, and not at all if an error comes before; yields what adds rows.

    Parameters
    ----------
    out : pathlib.Path
    schema : pyarrow.Schema
    format : str
    repeated : list of str
        Columns whose values may repeat themselves, for which Parquet keeps dictionaries.
    """
    aside = out.absolute().with_name(f".{out.name}.tmp")
    try:
        # Never a Python file; see `features.files.Root.open_native`.
        with pa.OSFile(str(aside), "wb") as sink, _writer(sink, schema, format, repeated) as writer:
            yield lambda table: writer.write(_flat(table) if format == "csv" else table)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def require_file(out: Path) -> None:
    """Check, before the work, that a file may be written there.

    Raises
    ------
    DataError
        If its folder is not there or a store, or it is one.
    """
    require_folder(out.absolute().parent)
    if out.is_dir():
        raise DataError(f"{out} is a directory; name a file, such as {out / 'samples.parquet'}")
    for folder in out.resolve().parents:
        if (folder / "store.json").exists():
            raise DataError(f"{out} is in the store {folder}, whose files are its own; write elsewhere")


def _joined(
    store: FeatureStore, view: View, listing: pa.Table
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32] | None]]:
    """Rows of the listing, each once, with their embeddings; None for those that have none."""
    left = np.ones(len(listing), bool)
    for rows, vectors in parts.join(store.root, view, samples.readable(listing)):
        left[rows] = False
        yield rows, vectors
    rows = np.flatnonzero(left)
    for start in range(0, len(rows), parts.ROWS):
        yield rows[start : start + parts.ROWS], None


def _columns(vectors: NDArray[np.float32] | None, rows: int, types: list[pa.DataType]) -> list[pa.Array]:
    if vectors is None:
        return [pa.nulls(rows, kind) for kind in types]
    if pa.types.is_floating(types[0]):
        return [pa.array(column) for column in np.ascontiguousarray(vectors.T)]
    return [pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), type=types[0])]


def _writer(sink: pa.NativeFile, schema: pa.Schema, format: Format, listed: list[str]) -> Any:
    if format == "parquet":
        # Dictionaries of floats cost time and space and help no reader.
        return pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=listed)
    if format == "arrow":
        return pa.ipc.new_file(sink, schema)
    return pyarrow.csv.CSVWriter(sink, _flat(schema.empty_table()).schema)


def _flat(table: pa.Table) -> pa.Table:
    """A table with nested columns as text, which CSV needs."""
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            table = table.set_column(place, field.name, _text(table[field.name]))
    return table


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        number = pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
        if number and not pc.list_flatten(column).null_count:
            texts = column.cast(pa.list_(pa.float32())) if pa.types.is_fixed_size_list(kind) else column
            joined = pc.binary_join(texts.cast(pa.list_(pa.string())), ", ")
            return pc.binary_join_element_wise("[", joined, "]", "")
    rows = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(rows, pa.string())])
