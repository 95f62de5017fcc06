"""A CSV, Parquet or JSON-lines table with an image column becomes a listing."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from features import locations, samples
from features.errors import SourceError, redacted

IMAGE_COLUMNS = ("image", "file", "path", "filename", "filepath", "file_name", "image_path")
SUFFIXES = (".csv", ".parquet", ".pq", ".jsonl", ".ndjson")


def list_table(location: str, image: str | None, id_column: str | None) -> pa.Table:
    """List the images that a table names; none is opened.

    Parameters
    ----------
    location : str
        A path or URL that ends with one of `SUFFIXES`.
    image, id_column : str, optional
        Columns with the images' paths, relative to the table, or URLs, and with the ids. Without an id column the
        paths are the ids.

    Returns
    -------
    pyarrow.Table
        Columns ``id, uri, version`` and the table's own.

    Raises
    ------
    SourceError
        If the table cannot be read, has no such column, or has an id twice.
    """
    shown = redacted(location)
    with locations.opened_native(location) as file:
        header = _header(file, location)
        image = image or _only_image_column(shown, header)
        for column, option in ((image, "--image"), (id_column, "--id")):
            if column is not None and column not in header:
                raise SourceError(f"{shown} has no column {column!r} for {option}; it has {', '.join(header)}")
        table = _read(file, location, {image, id_column or image})
    own = [name for name in table.column_names if name != image and not (name == id_column and name.lower() == "id")]
    remedy = "rename it, or pass --id id to use an 'id' as such" if "id" in own else "rename it"
    samples.require_free_names(own, f"table {shown}", remedy)
    uris = _uris(table[image], location)
    if id_column:
        ids = table[id_column].combine_chunks()
    else:
        # A URL may carry a key that is not to be kept.
        ids = pa.array([value and redacted(value) for value in table[image].to_pylist()], pa.string())
    _require_unique(ids, shown)
    versions = pa.array(locations.versions(uris), pa.string())
    return pa.table(
        {"id": ids, "uri": pa.array(uris, pa.string()), "version": versions} | {name: table[name] for name in own}
    )


def read(location: str, as_text: set[str]) -> pa.Table:
    """Read a table, those of its columns that are named as text.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    if not location.lower().endswith(SUFFIXES):
        raise SourceError(f"table {redacted(location)} is of no known kind ({', '.join(SUFFIXES)})")
    with locations.opened_native(location) as file:
        return _read(file, location, as_text & set(_header(file, location)))


def _uris(images: pa.ChunkedArray, location: str) -> list[str]:
    """Where each image is: a URL, or a path, which is relative to the table."""
    base, slash, _ = location.rpartition("/")
    local = locations.local_path(location)
    if local is not None:
        base, slash = str(Path(local).parent), os.sep
    return [
        "" if not value else value if "://" in value or value.startswith("/") else base + slash + value
        for value in images.to_pylist()
    ]


def _header(file: pa.NativeFile, location: str) -> list[str]:
    """Names of the columns; those of JSON lines are all that any line has, so reading tells them."""
    try:
        if location.lower().endswith(".csv"):
            start = file.read(locations.CHUNK).decode(
                "utf-8-sig", "ignore" if file.size() > locations.CHUNK else "strict"
            )
            names: list[str] = next(csv.reader(io.StringIO(start, newline="")), [])
        elif location.lower().endswith((".jsonl", ".ndjson")):
            names = pyarrow.json.read_json(file).column_names
        else:
            names = pq.read_schema(file).names
    except (pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        raise _unreadable(location, error) from None
    file.seek(0)
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise SourceError(f"table {redacted(location)} has two columns {doubled[0]!r}; rename one of them")
    return names


def _read(file: pa.NativeFile, location: str, as_text: set[str]) -> pa.Table:
    """Read a table, some of its columns as text."""
    text = dict.fromkeys(as_text, pa.string())
    try:
        if location.lower().endswith(".csv"):
            # "NA" is no number, but it may be a word: in a column of text only the empty cell is missing.
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            table = pyarrow.csv.read_csv(file, convert_options=options)
            if pa.binary() in table.schema.types:
                raise SourceError(f"table {redacted(location)} is not UTF-8; save it as such")
            table = pa.table({name: _empty_is_null(table[name]) for name in table.column_names})
        elif location.lower().endswith((".jsonl", ".ndjson")):
            table = _read_json_lines(file, pa.schema(list(text.items())))
        else:
            table = pq.ParquetFile(file).read().replace_schema_metadata(None)
        fields = [pa.field(field.name, text.get(field.name, field.type)) for field in table.schema]
        return table.cast(pa.schema(fields))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(location, error) from None


def _read_json_lines(file: pa.NativeFile, text: pa.Schema) -> pa.Table:
    try:
        # Left to itself, the reader takes "2026-11-21" for a time.
        table = pyarrow.json.read_json(file, parse_options=pyarrow.json.ParseOptions(explicit_schema=text))
    except pa.ArrowInvalid:
        # It takes no number for a text, and left to itself it rounds large ones.
        file.seek(0)
        table = pyarrow.json.read_json(file)
        file.seek(0)
        lines = [json.loads(line, parse_int=str, parse_float=str) for line in file.read().splitlines() if line.strip()]
        for name in text.names:
            values = pa.array([line.get(name) for line in lines], pa.string())
            table = table.set_column(table.column_names.index(name), name, values)
    # The reader lets anything pass as UTF-8.
    table.validate(full=True)
    return table


def _unreadable(location: str, error: Exception) -> SourceError:
    foreign = isinstance(error, UnicodeDecodeError) or "invalid utf8" in str(error).lower()
    told = "it is not UTF-8; save it as such" if foreign else " ".join(str(error).split())
    return SourceError(f"table {redacted(location)} cannot be read: {told}")


def _empty_is_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type != pa.string():
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _only_image_column(shown: str, header: list[str]) -> str:
    known = [name for name in header if name.lower() in IMAGE_COLUMNS]
    if not header:
        raise SourceError(f"table {shown} is empty")
    if len(known) != 1:
        raise SourceError(f"name the image column of {shown} with --image; it has {', '.join(header)}")
    return known[0]


def _require_unique(ids: pa.Array, shown: str) -> None:
    if ids.null_count:
        row = pc.index(ids.is_null(), True).as_py() + 1
        raise SourceError(f"row {row} of {shown} has no id; pass --id with a column that is always filled")
    counts = pc.value_counts(ids)
    doubled = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(doubled):
        key = doubled.field("values")[0]
        rows = pc.indices_nonzero(pc.equal(ids, key)).to_pylist()
        raise SourceError(
            f"id {key.as_py()!r} stands in rows {rows[0] + 1} and {rows[1] + 1} of {shown}; "
            "pass --id with a column without doubles"
        )
