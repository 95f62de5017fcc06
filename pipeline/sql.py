"""SQL over a store: DuckDB reads the samples and the views where they are, and reaches nothing else."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from features import tabular
from features.errors import DataError
from features.export import Format, require_file, whole_table
from features.store import FeatureStore

SHOWN = 40
"""Rows that a person reads."""
ROWS = 8192
"""Rows that are handed over at a time."""
SAMPLES = "samples"
ALL_VIEWS = ("show", "information_schema", "duckdb_", "query_table")
"""What asks for tables without naming them."""
ASKING = {getattr(duckdb.StatementType, name) for name in ("SELECT", "EXPLAIN", "EXECUTE", "PRAGMA", "CALL", "MULTI")}
_FORMATS: dict[str, Format] = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@contextmanager
def opened(store: FeatureStore, sql: str, snapshot: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database whose tables are a store's: ``samples``, and the views by their names.

    A view has the samples that it has an embedding of, with their columns and ``embedding``, FLOAT[dim]. Everything is
    read as a query needs it, and what is put aside lies in a folder for temporary files until the end.

    The SQL is a user's text, so it runs where it can reach nothing but these tables: no file, no network, no variable
    of this process, and no way to change that.

    Parameters
    ----------
    store : FeatureStore
    sql : str
        What is going to be asked; a view that it does not name is left out, since its keys would be read.
    snapshot : int, optional
        Number of the listing; the newest by default.

    Raises
    ------
    DataError
        If two tables have one name, as SQL reads it; or the SQL cannot be answered.
    StoreError
        If there is no such snapshot.
    """
    known, text = store.views().values(), sql.lower()
    views = [view for view in known if view.name.lower() in text or any(word in text for word in ALL_VIEWS)]
    folded = [SAMPLES, *(view.name.lower() for view in views)]
    if doubled := [name for name in folded if folded.count(name) > 1]:
        raise DataError(f"several tables are called {doubled[0]!r}, since SQL knows no capitals and `samples` is one")
    with tempfile.TemporaryDirectory(prefix="permafrost-") as scratch:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "enable_external_access": "false",
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "temp_directory": scratch,
            # It knows no sizes of these tables, and would hold the embeddings of a join in memory.
            "disabled_optimizers": "build_side_probe_side",
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            connection.register(SAMPLES, tabular.listing(store, snapshot))
            for view in views:
                connection.register(f"{view.name}/parts", tabular.distinct(store, view))
                # Of a join, the right side is held in memory.
                connection.execute(
                    f"""create temp view "{view.name}" as select samples.*, embedding
                    from "{view.name}/parts" join samples using (sha256) where status = 'ok'"""
                )
            connection.execute("set lock_configuration = true")
            try:
                yield connection
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                # Arrow hands on by an OSError what DuckDB says while an answer is fetched, but without a number.
                if isinstance(error, OSError) and error.errno:
                    raise
                told = f"{error}".strip().splitlines() or [type(error).__name__]
                there = ", ".join([SAMPLES, *(f'"{view.name}"' for view in (known if sql else ()))])
                remedy = f"; the tables are {there}" if isinstance(error, duckdb.CatalogException) else ""
                if isinstance(error, duckdb.ParserException) and views:
                    remedy = f'; views are named in double quotes, as "{views[0].name}"'
                raise DataError(f"the SQL cannot be answered: {told[0]}{remedy}") from None


def show(store: FeatureStore, sql: str, snapshot: int | None = None) -> tuple[list[str], list[tuple[Any, ...]], int]:
    """Answer a question for a person: names of the columns, the first `SHOWN` rows, and how many there are."""
    with opened(store, sql, snapshot) as connection, _answered(connection, sql) as answer:
        first, count = answer.schema.empty_table(), 0
        for batch in answer:
            if count < SHOWN:
                first = pa.concat_tables([first, pa.table(batch).slice(0, SHOWN - count)])
            count += len(batch)
        return answer.schema.names, _rows(first), count


def answer(store: FeatureStore, sql: str, snapshot: int | None = None) -> dict[str, Any]:
    """Answer a question for a program: ``columns``, their names, and ``rows``, lists of what JSON knows."""
    with opened(store, sql, snapshot) as connection, _answered(connection, sql) as answer:
        rows = [[_plain(value) for value in row] for row in _rows(answer.read_all())]
        return {"columns": answer.schema.names, "rows": rows}


def write(store: FeatureStore, sql: str, out: Path, snapshot: int | None = None) -> int:
    """Write an answer to a file, whole or not at all; returns how many rows it has.

    Parameters
    ----------
    store : FeatureStore
    sql : str
    out : pathlib.Path
        Its suffix says what is written: ``.parquet``, ``.csv`` or ``.arrow``.
    snapshot : int, optional

    Raises
    ------
    DataError
        If the SQL cannot be answered, `out` cannot be such a file, or such files do not know a column's type.
    """
    require_file(out)
    if out.suffix not in _FORMATS:
        raise DataError(f"--out {out} says no format; name it {', '.join(f'*{suffix}' for suffix in _FORMATS)}")
    count = 0
    with opened(store, sql, snapshot) as connection, _answered(connection, sql) as answer:
        names = [name.lower() for name in answer.schema.names]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise DataError(f"several columns of the answer are called {doubled[0]!r}; name them with AS")
        repeated = [field.name for field in answer.schema if not pa.types.is_nested(field.type)]
        with whole_table(out, answer.schema, _FORMATS[out.suffix], repeated) as add:
            for batch in answer:
                add(pa.table(batch))
                count += len(batch)
    return count


@contextmanager
def _answered(connection: duckdb.DuckDBPyConnection, sql: str) -> Iterator[pa.RecordBatchReader]:
    statements = connection.extract_statements(sql)
    if not statements or statements[-1].type not in ASKING:
        raise DataError("the SQL cannot be answered: it asks for nothing; write a select")
    asked = connection.sql(sql)
    with asked.to_arrow_reader(ROWS) as answer:
        yield answer


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    columns = [column.to_pylist() for column in table.columns]
    return list(zip(*columns, strict=True))


def _plain(value: Any) -> Any:
    """A value as JSON knows it: what is no number is null, and times and the like are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, bool | int | str) else json.loads(json.dumps(value, default=str))
