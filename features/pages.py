"""Vectors straight out of a Parquet file's pages, past the work of finding out that nothing is missing.

Arrow decodes the levels of each value to learn that none is null and all lists have one length, which takes longer
than reading them. Parts say so in their schema already. Pages of any other kind are left to Arrow.
Source: the Parquet format's description of data pages and of Thrift's compact protocol.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

_CODECS = {"UNCOMPRESSED": None, "LZ4": "lz4_raw", "SNAPPY": "snappy", "ZSTD": "zstd"}
_DATA_PAGE, _PLAIN = 0, 0


def read_vectors(file: pa.NativeFile, opened: pq.ParquetFile, group: int, dim: int) -> NDArray[np.uint8]:
    """Read the embeddings of one row group; each page's checksum is checked.

    Parameters
    ----------
    file : pyarrow.NativeFile
    opened : pyarrow.parquet.ParquetFile
        The same file.
    group : int
    dim : int

    Returns
    -------
    numpy.ndarray
        uint8, shape (rows, 4 * dim): float32 as bytes, since they are not aligned.

    Raises
    ------
    OSError, ValueError, IndexError, KeyError
        If a page is damaged.
    """
    if not _is_plain(opened, group, dim):
        column = opened.read_row_group(group, ["embedding"], use_threads=False)["embedding"].combine_chunks()
        values: NDArray[np.float32] = column.flatten().to_numpy()
        return values.view(np.uint8).reshape(-1, 4 * dim)
    chunk = opened.metadata.row_group(group).column(1)
    file.seek(chunk.data_page_offset)
    buffer = memoryview(file.read_buffer(chunk.total_compressed_size)).cast("B")
    codec, at, left, pages = _CODECS[chunk.compression], 0, chunk.num_values, []
    while left:
        header, at = _struct(buffer, at)  # 1 type, 2 and 3 sizes, 4 checksum, 5 data page: 1 values, 2 encoding
        values, size = header[5][1], header[3]
        fits = 0 < values <= left and 0 < size <= len(buffer) - at
        if (header[1], header[5][2]) != (_DATA_PAGE, _PLAIN) or not fits:
            raise ValueError("a page's header is damaged")
        body, at = buffer[at : at + size], at + size
        if crc32(body) != header[4] & 0xFFFFFFFF:
            raise OSError("a page's checksum is wrong")
        content = memoryview(pa.Codec(codec).decompress(body, header[2])).cast("B") if codec else body
        start = 0
        for _ in range(2):  # Repetition and definition levels, each after its length.
            start += 4 + int.from_bytes(content[start : start + 4], "little")
        # The header has no checksum of its own.
        if len(content) != start + 4 * values:
            raise ValueError("a page's header is damaged")
        pages.append(np.frombuffer(content, np.uint8, offset=start))
        left -= values
    return (pages[0] if len(pages) == 1 else np.concatenate(pages)).reshape(-1, 4 * dim)


def _is_plain(opened: pq.ParquetFile, group: int, dim: int) -> bool:
    column = opened.schema.column(1)
    chunk = opened.metadata.row_group(group).column(1)
    return (
        (column.path, column.physical_type) == ("embedding.list.element", "FLOAT")
        and (column.max_definition_level, column.max_repetition_level) == (1, 1)
        and set(chunk.encodings) == {"PLAIN", "RLE"}
        and not chunk.has_dictionary_page
        and chunk.compression in _CODECS
        and chunk.num_values == opened.metadata.row_group(group).num_rows * dim
    )


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := buffer[at]) > 127:
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
    return value | byte << shift, at + 1


def _struct(buffer: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A struct such as a page's header: its numbers by field, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while byte := buffer[at]:
        kind, number, at = byte & 15, number + (byte >> 4), at + 1
        if kind == 12:
            fields[number], at = _struct(buffer, at)
        elif kind in (4, 5, 6, 8):
            value, at = _varint(buffer, at)
            fields[number] = value >> 1 ^ -(value & 1)
            at += value if kind == 8 else 0
        elif kind not in (1, 2):
            raise ValueError(f"a page's header has a field of type {kind}")
    return fields, at + 1
