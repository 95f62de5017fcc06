"""Labels that stand in a table of their own, joined to the samples."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features import guards, samples, tables
from features.errors import DataError, redacted

MOST_UNMATCHED = "10%"


def join(
    listing: pa.Table, location: str, on: str = "id", max_unmatched: str = MOST_UNMATCHED
) -> tuple[pa.Table, dict[str, Any]]:
    """Give the samples the columns of another table, in the place of their own of that name.

    Parameters
    ----------
    listing : pyarrow.Table
        Samples of a snapshot.
    location : str
        Path or URL of a CSV, Parquet or JSON-lines table.
    on : str
        Column of it that names the sample: the samples' own column of that name has the same values, or else `id` has.
    max_unmatched : str
        How many of its rows may fit no sample, or contradict another row: a count, or a share.

    Returns
    -------
    listing : pyarrow.Table
    counts : dict
        ``table``, ``rows``, and of these ``unmatched``, ``repeated`` (equal to another row) and ``contradictory``
        (of one sample, but not equal; all of them are left out).

    Raises
    ------
    DataError
        If there are more than `max_unmatched`, or no column to join on.
    """
    shown = redacted(location)
    table = tables.read(location, {on})
    if on not in table.column_names:
        raise DataError(f"table {shown} has no column {on!r} for --on; it has {', '.join(table.column_names)}")
    key = on if on in listing.column_names else "id"
    fresh = [name for name in table.column_names if name != on]
    samples.require_free_names([name for name in fresh if name != "id"], f"table {shown}", "rename it")
    if "id" in fresh:
        raise DataError(f"table {shown} has an 'id' beside --on {on}; leave it out, or join on it")
    table, repeated, contradictory = _one_each(table.filter(pc.is_valid(table[on])), on)
    keys = listing[key].cast(pa.string()).combine_chunks()
    unmatched = table.filter(pc.invert(pc.is_in(table[on], keys)))[on]
    rows = len(table) + repeated + contradictory
    counts = {
        "table": shown,
        "rows": rows,
        "unmatched": len(unmatched),
        "repeated": repeated,
        "contradictory": contradictory,
    }
    if len(unmatched) + contradictory > guards.most(max_unmatched, rows, "--max-unmatched"):
        example = f", such as {unmatched[0].as_py()!r}" if len(unmatched) else ""
        raise DataError(
            f"of {rows:,} rows of {shown}, {len(unmatched):,} fit no sample by {key!r}{example}, and "
            f"{contradictory:,} contradict each other; mend the table, name another --on, or raise --max-unmatched"
        )
    if key == "id":
        matched = listing.filter(pc.is_in(keys, table[on].combine_chunks()))["id"]
        shared = len(matched) - len(pc.unique(matched))
        if shared:
            raise DataError(
                f"{shared:,} ids of {shown} stand in two sources; join --on sha256 or another column of both"
            )
    place = pc.index_in(keys, table[on].combine_chunks())
    for name in fresh:
        values = table[name].take(place)
        at = listing.column_names.index(name) if name in listing.column_names else None
        listing = listing.append_column(name, values) if at is None else listing.set_column(at, name, values)
    return listing, counts


def _one_each(table: pa.Table, on: str) -> tuple[pa.Table, int, int]:
    """A table with each key once; how many rows repeated another, and how many contradicted one."""
    told = pc.value_counts(table[on].combine_chunks())
    doubled = told.filter(pc.greater(told.field("counts"), 1)).field("values")
    if not len(doubled):
        return table, 0, 0
    among = pc.is_in(table[on], doubled)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.filter(among).to_pylist():
        rows.setdefault(row[on], []).append(row)
    agreed = [same[0] for same in rows.values() if all(row == same[0] for row in same)]
    repeated = sum(len(rows[row[on]]) - 1 for row in agreed)
    contradictory = sum(map(len, rows.values())) - repeated - len(agreed)
    single = table.filter(pc.invert(among))
    return pa.concat_tables([single, pa.Table.from_pylist(agreed, schema=table.schema)]), repeated, contradictory
