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


RESERVED = frozenset({*SCHEMA.names, "embedding", "prediction"})
"""Names that no source's own column may have, in capitals or not: SQL tells columns apart without."""

LARGEST_EXACT = 2**53
"""Beyond this, float64 does not tell neighbouring integers apart."""


def is_free(name: str) -> bool:
    """Whether a source's own column may have a name."""
    return bool(name) and name.lower() not in RESERVED and not name.lower().startswith("permafrost")


def require_free_names(own: list[str], where: str, remedy: str) -> None:
    """Check that no column of a source is called like one of the listing, and no two differ only in capitals.

    Raises
    ------
    SourceError
        Naming the column, and with the remedy.
    """
    if "" in own:
        raise SourceError(f"{where} has a column without a name; leave it out, as pandas does with index=False")
    clash = [name for name in own if not is_free(name)]
    if clash:
        raise SourceError(
            f"column {clash[0]!r} of {where} clashes with the listing's own {clash[0].lower()!r}; {remedy}"
        )
    folded = [name.lower() for name in own]
    doubled = [name for name in own if folded.count(name.lower()) > 1]
    if doubled:
        raise SourceError(f"columns {doubled[0]!r} and {doubled[1]!r} of {where} differ only in capitals; rename one")


def own_columns(table: pa.Table) -> list[str]:
    """Names of the columns that come from the sources themselves."""
    return [name for name in table.column_names if name not in SCHEMA.names]


def empty() -> pa.Table:
    """A listing of nothing."""
    return SCHEMA.empty_table()


def readable(listing: pa.Table) -> pa.ChunkedArray:
    """SHA-256 of the samples that could be read and decoded, null for the others."""
    return pc.if_else(pc.equal(listing["status"], "ok"), listing["sha256"], pa.scalar(None, pa.string()))


def read_rows(listing: pa.Table, facts: list[dict[str, Any]]) -> pa.Table:
    """Rows by `READING`, from some rows of a listing and what reading each of them told."""
    rows = [
        {"id": key, "version": version, **told}
        for key, version, told in zip(listing["id"].to_pylist(), listing["version"].to_pylist(), facts, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=READING)


def normalised(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A source's column in the type that the listing keeps it in.

    One type for text, one for integers, one for fractions, and only types that Parquet gives back as they are, so
    that it does not depend on who wrote a table whether two listings are alike. NaN becomes null, and of times
    microseconds are kept.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return normalised(column.cast(kind.value_type))
    if any(check(kind) for check in (pa.types.is_null, pa.types.is_large_string, pa.types.is_string_view)):
        return column.cast(pa.string())
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return column.cast(pa.int64())
    if pa.types.is_decimal(kind) or pa.types.is_floating(kind):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        element = normalised(pa.chunked_array([], kind.value_type)).type
        return column.cast(pa.list_(pa.field("element", element)))
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    return column.cast(pa.time32("ms")) if kind == pa.time32("s") else column


def replaced(listed: pa.Table, source: str, ids: pa.ChunkedArray, whole: bool) -> pa.ChunkedArray:
    """Which rows of a listing go when a source is listed anew: all of its rows, or if not `whole` those of `ids`."""
    mine = pc.equal(listed["source"], source)
    return mine if whole else pc.and_(mine, pc.is_in(listed["id"], value_set=ids.combine_chunks()))


def merge(old: pa.Table, new: pa.Table, gone: pa.ChunkedArray) -> pa.Table:
    """Put new rows in the place of old ones.

    Parameters
    ----------
    old, new : pyarrow.Table
        Listings, with columns of their sources' own.
    gone : pyarrow.ChunkedArray
        Booleans: which rows of `old` go.

    Returns
    -------
    pyarrow.Table
        Sorted by source and id; a column that only one side has is null on the other, and one without a single value
        is no column.

    Raises
    ------
    SourceError
        If a column has another type on either side.
    """
    kept = _with_values(old.filter(pc.invert(gone)))
    for name in own_columns(new):
        new = new.set_column(new.column_names.index(name), name, normalised(new[name]))
    new = _with_values(new)
    if len(new):
        require_same_types(kept, new, new["source"][0].as_py())
    merged = pa.concat_tables([kept, new], promote_options="permissive")
    columns = SCHEMA.names + sorted(own_columns(merged))
    return merged.select(columns).sort_by([("source", "ascending"), ("id", "ascending")]).combine_chunks()


def _with_values(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name in own_columns(table) if table[name].null_count == len(table)])


def require_same_types(old: pa.Table, new: pa.Table, source: str) -> None:
    """Check that a column of one name has one type in the store and in a source; integers and fractions go together.

    Raises
    ------
    SourceError
        Naming the column and both sides.
    """
    theirs = {name.lower(): name for name in own_columns(_with_values(old))}
    for name in own_columns(_with_values(new)):
        other = theirs.get(name.lower())
        if other is None:
            continue
        ours = normalised(new[name].slice(0, 0)).type
        if name == other and (ours == old[other].type or _go_together(new[name], old[other])):
            continue
        raise SourceError(
            f"column {name!r} is {ours} in source {source}, but {'' if other == name else f'{other!r} is '}"
            f"{old[other].type} in source {old.filter(old[other].is_valid())['source'][0]}; rename or convert one"
        )


def _go_together(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Whether of two columns one holds integers and one fractions, and no integer would lose a digit."""
    integers = [column for column in (one, other) if pa.types.is_integer(column.type)]
    if len(integers) != 1 or not all(pa.types.is_integer(c.type) or pa.types.is_floating(c.type) for c in (one, other)):
        return False
    ends = pc.min_max(integers[0]).as_py()
    return all(abs(end) <= LARGEST_EXACT for end in ends.values() if end is not None)
