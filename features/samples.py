"""The listing: one row per sample, what its columns are, and how the listings of several sources become one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import SourceError

SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # name of the source it was listed in
        ("id", pa.string()),  # unique within the source
        ("uri", pa.string()),  # where its bytes are
        ("version", pa.string()),  # of the file when it was listed: size and mtime, or an ETag
        ("sha256", pa.string()),  # of its bytes; the key of its embedding
        ("bytes", pa.int64()),
        ("width", pa.int32()),  # in pixels, upright
        ("height", pa.int32()),
        ("format", pa.string()),  # as Pillow names it
        ("status", pa.string()),  # ok, or failed
        ("error", pa.string()),  # reason code and detail of a failure
    ]
)
READ = SCHEMA.names[4:]
"""What only reading the file tells."""
READING = pa.schema([SCHEMA.field(name) for name in ("id", "version", *READ)])
"""What was read, and of which version of which sample."""


def own_columns(table: pa.Table) -> list[str]:
    """Names of the columns that come from the sources themselves."""
    return [name for name in table.column_names if name not in SCHEMA.names]


def empty() -> pa.Table:
    """A listing of nothing."""
    return SCHEMA.empty_table()


def read_rows(listing: pa.Table, facts: list[dict[str, Any]]) -> pa.Table:
    """Rows by `READING`, from some rows of a listing and what reading each of them told."""
    rows = [
        {"id": key, "version": version, **told}
        for key, version, told in zip(listing["id"].to_pylist(), listing["version"].to_pylist(), facts, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=READING)


def merge(old: pa.Table, new: pa.Table, replaced: pa.BooleanArray | pa.ChunkedArray) -> pa.Table:
    """Put new rows in the place of old ones.

    Parameters
    ----------
    old, new : pyarrow.Table
        Listings, with columns of their sources' own.
    replaced : pyarrow.BooleanArray
        Which rows of `old` go.

    Returns
    -------
    pyarrow.Table
        Sorted by source and id; a column that only one side has is null on the other.

    Raises
    ------
    SourceError
        If a column has another type on either side.
    """
    kept = old.filter(pc.invert(replaced))
    kept = kept.drop_columns(_without_a_value(kept))
    if len(new):
        require_same_types(kept, new, new["source"][0].as_py())
    new = new.drop_columns([name for name in _without_a_value(new) if name in kept.column_names])
    merged = pa.concat_tables([kept, new], promote_options="default")
    columns = SCHEMA.names + sorted(own_columns(merged))
    return merged.select(columns).sort_by([("source", "ascending"), ("id", "ascending")]).combine_chunks()


def _without_a_value(table: pa.Table) -> list[str]:
    return [name for name in own_columns(table) if table[name].null_count == len(table)]


def require_same_types(old: pa.Table, new: pa.Table, source: str) -> None:
    """Check that a column of one name has one type in the store and in a source.

    Columns without a single value fit any type.

    Raises
    ------
    SourceError
        Naming the column and both sides.
    """
    for name in set(own_columns(new)) & set(own_columns(old)):
        ours, theirs = new[name], old[name]
        if ours.type == theirs.type or ours.null_count == len(ours):
            continue
        other = old.filter(theirs.is_valid())
        if len(other):
            raise SourceError(
                f"column {name!r} is {ours.type} in source {source}, "
                f"but {theirs.type} in source {other['source'][0]}; rename or convert one of them"
            )
