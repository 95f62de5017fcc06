"""Tables to Parquet bytes and back: the settings, and what is kept beside the columns."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROW_GROUP = 1024
# Dictionaries of floats and of digests, and statistics over floats, cost time and space and help no reader.
# Compression saves a sixth and doubles the time of reading; see tests/benchmarks/loading.py.
PART_SETTINGS: dict[str, Any] = {
    "row_group_size": ROW_GROUP,
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": ["sha256"],
    "write_page_checksum": True,
}
META = b"permafrost"
"""Key of the facts beside the columns, as JSON, among a schema's metadata."""


def encode(table: pa.Table, meta: dict[str, Any]) -> bytes:
    """Encode a listing, with facts about it beside its columns."""
    sink = io.BytesIO()
    pq.write_table(_with_meta(table, meta), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def open_file(file: pa.NativeFile) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """Open what `encode` or `encode_part` wrote; each page's checksum is checked as it is read.

    Parameters
    ----------
    file : pyarrow.NativeFile
        Never a Python file; see `features.files.Root.open_native`.

    Returns
    -------
    opened : pyarrow.parquet.ParquetFile
    meta : dict
        The facts beside the columns.
    """
    opened = pq.ParquetFile(file, page_checksum_verification=True)
    return opened, json.loads(opened.schema_arrow.metadata[META])


def decode(content: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Decode what `encode` made: the listing, and the facts beside its columns."""
    opened, meta = open_file(pa.BufferReader(content))
    return opened.read().replace_schema_metadata(None), meta


def part_schema(dim: int) -> pa.Schema:
    """What the columns of a part are."""
    vectors = pa.list_(pa.field("element", pa.float32(), nullable=False), dim)
    return pa.schema([pa.field("sha256", pa.string(), nullable=False), pa.field("embedding", vectors, nullable=False)])


def part_table(sha256: list[str], embeddings: NDArray[np.float32]) -> pa.Table:
    """What a part holds, by `part_schema`."""
    schema, values = part_schema(embeddings.shape[1]), np.ascontiguousarray(embeddings, np.float32).reshape(-1)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=schema.field("embedding").type)
    return pa.table([pa.array(sha256, pa.string()), vectors], schema=schema)


def encode_part(sha256: list[str], embeddings: NDArray[np.float32], meta: dict[str, Any]) -> bytes:
    """Encode embeddings as ``sha256, embedding``, neither of which is ever null.

    Parameters
    ----------
    sha256 : list of str
    embeddings : numpy.ndarray
        float32, shape (images, dim).
    meta : dict
    """
    table, sink = _with_meta(part_table(sha256, embeddings), meta), io.BytesIO()
    pq.write_table(table, sink, data_page_size=ROW_GROUP * embeddings.shape[1] * 4, **PART_SETTINGS)
    return sink.getvalue()


def _with_meta(table: pa.Table, meta: dict[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({META: json.dumps(meta)})
